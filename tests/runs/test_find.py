"""The learning-rate finder and the batch-size finder."""

import re
from pathlib import Path

import pytest

from conftest import TINY
from fewtokens.errors import FewtokensError
from fewtokens.runs.find_lr import to_tune

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


def test_what_is_tuned_is_what_would_be_trained(composed) -> None:
    cfg = composed(*SHORT, "callbacks=freeze", "init_from=other.ckpt", base="find_lr")
    with pytest.raises(FewtokensError, match=r"A checkpoint must be a file, .* but other\.ckpt does not exist"):
        to_tune(cfg)
    cfg.init_from, cfg.task.teacher = None, "teacher"
    with pytest.raises(FewtokensError, match=r"`task\.teacher` must be a run directory .* got 'teacher'"):
        to_tune(cfg)
    cfg.task.teacher = None
    _, task, _ = to_tune(cfg)
    assert {name for name, p in task.named_parameters() if p.requires_grad} == {
        "model.vit.head.weight",
        "model.vit.head.bias",
    }


@pytest.mark.slow
def test_the_batch_size_is_the_highest_that_fits(command) -> None:
    done = command("fewtokens.runs.find_batch_size", *SHORT, "find.first=16", "find.highest=64")
    assert "Training fits with data.batch_size=64 (the highest that was tried)" in done.stdout
    done = command("fewtokens.runs.find_batch_size", *SHORT, "trainer=ddp_sim", code=1)
    assert "`trainer.devices` must be 1 to find settings, got 2" in done.stderr
