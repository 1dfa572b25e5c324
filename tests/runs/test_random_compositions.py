"""Random compositions of groups and overrides: none ends in an error that is not a sentence."""

import os
import subprocess
import sys

import pytest

from conftest import ROOT, environment


@pytest.mark.slow
def test_random_compositions_train_or_end_with_a_sentence() -> None:
    """FEWTOKENS_COMPOSITIONS=5000 runs more than the first 300, FEWTOKENS_COMPOSITIONS=300:5000 others."""
    # In a process of its own, without jaxtyping's hook: with it, wrong values end in errors that users never see.
    first, _, last = os.environ.get("FEWTOKENS_COMPOSITIONS", "0:300").rpartition(":")
    command = [sys.executable, str(ROOT / "tests" / "random_compositions.py"), first or "0", last]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
