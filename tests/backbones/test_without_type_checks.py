"""Tests that torch.compile and forked ranks need in a process without jaxtyping's checks, which they cannot run.

They are skipped where they stand, and run here together, since each process needs seconds to import torch.
"""

import pytest

from conftest import ROOT, run_without_type_checks
from test_methods import HOOKED, METHODS

# Whole runs come first: torch refuses to fork a process after some of the tests of compilation.
FILES = [str(ROOT / "tests" / name) for name in ("runs/test_fsdp.py", "test_methods.py", "test_encoder_layer.py")]
COMPILED = ("ats", "tome")

pytestmark = pytest.mark.skipif(not HOOKED, reason="nothing to do: the tests ran where they stand")


def test_every_method_steps_on_two_ranks_and_some_compile() -> None:
    whole = [f"test_compiled_it_gives_the_eager_logits_without_a_graph_break[{method}]" for method in COMPILED]
    chosen = (*whole, "test_compiled_layers_equal_eager_ones[ats]", "test_layers_of_one_shape",
              "test_two_processes_equal_one", "test_a_sharded_run_goes_on")  # fmt: skip
    printed = run_without_type_checks(*FILES, "-s", "-k", " or ".join(chosen))
    assert f"{len(COMPILED) + 4} passed" in printed
    for rank in range(2):
        for method in METHODS:
            assert f"rank {rank}: {method}." in printed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_compiled_it_gives", "test_compiled_layers"])
def test_every_method_compiles(name: str) -> None:
    assert f"{len(METHODS)} passed" in run_without_type_checks(*FILES, "-k", name)


@pytest.mark.slow
def test_sharded_steps_of_every_optimizer() -> None:
    assert "3 passed" in run_without_type_checks(*FILES, "-k", "test_a_sharded_step_of_every_other_optimizer")
