"""Freed memory is used again. Every case is a process of its own, since the setting is one of the whole process."""

import os
import subprocess
import sys

import pytest

from fewtokens.runs.allocator import VARIABLES

BLOCKS = """
import resource
from fewtokens.runs.allocator import keep_freed_memory

keep_freed_memory()
b"x" * 2**26
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
b"x" * 2**26
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(**variables: str) -> int:
    """Return the number of page faults when a block of 64 MiB, 16,384 pages, is filled a second time."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | variables
    return int(subprocess.check_output([sys.executable, "-c", BLOCKS], env=environment, text=True))


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is a function of glibc")
def test_a_freed_block_is_used_again_unless_the_user_has_set_the_allocator() -> None:
    assert page_faults() < 100
    assert page_faults(MALLOC_MMAP_THRESHOLD_=str(2**20)) > 10_000
