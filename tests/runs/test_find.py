"""The learning-rate finder and the batch-size finder."""

import re
from pathlib import Path

import pytest

from conftest import TINY

SHORT = [part for part in TINY if not part.startswith(("trainer.", "measure"))]


def test_the_learning_rate_is_within_the_range(command, tmp_path: Path) -> None:
    done = command(
        "fewtokens.runs.find_lr", *SHORT, "optimizer=adamw", "find.lowest=1e-4", f"hydra.run.dir={tmp_path}/r"
    )
    rate = float(re.search(r"optimizer\.lr=(\S+)", done.stdout).group(1))
    assert 1e-4 < rate < 1
    assert (tmp_path / "r" / "find_lr.png").stat().st_size > 1000
    assert not list((tmp_path / "r").glob(".lr_find*")), "no checkpoint is left"
    done = command("fewtokens.runs.find_lr", *SHORT, "find.lowest=2.0", code=1)
    assert "`find.lowest` must be a number above 0 and below find.highest, got 2.0" in done.stderr


@pytest.mark.slow
def test_the_batch_size_is_the_highest_that_fits(command) -> None:
    done = command("fewtokens.runs.find_batch_size", *SHORT, "find.first=16", "find.highest=64")
    assert "Training fits with data.batch_size=64 (the highest that was tried)" in done.stdout
    done = command("fewtokens.runs.find_batch_size", *SHORT, "trainer=ddp_sim", code=1)
    assert "`trainer.devices` must be 1 to find settings, got 2" in done.stderr
