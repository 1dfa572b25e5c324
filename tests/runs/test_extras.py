"""The settings in `extras`, and the keys that users of lightning-hydra-template know."""

import os
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from conftest import TINY
from fewtokens.errors import FewtokensError
from fewtokens.runs import cli, extras
from fewtokens.runs import train as training


def settings(tags: object = (), **changes: bool):
    chosen = {"print_config": False, "enforce_tags": False, "ignore_warnings": False} | changes
    return OmegaConf.create({"tags": list(tags) if isinstance(tags, tuple) else tags, "extras": chosen})


def test_tags_are_asked_for_on_a_terminal_and_else_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = settings(enforce_tags=True)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    with pytest.raises(FewtokensError, match=r"`tags` must not be empty with extras\.enforce_tags=true"):
        extras.apply(cfg)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    answers = iter([" ", "baseline, try 2"])
    monkeypatch.setattr(extras.Prompt, "ask", lambda *_: next(answers))
    extras.apply(cfg)
    assert cfg.tags == ["baseline", "try 2"]
    extras.apply(cfg)
    with pytest.raises(FewtokensError, match="`tags` must be a list of words, got 'a'"):
        extras.apply(settings("a"))
    with pytest.raises(FewtokensError, match=r"`extras\.print_config` must be true or false, got 1"):
        extras.apply(settings(print_config=1))


def test_the_tree_has_all_groups(capsys) -> None:
    console = Console(width=60)
    console.print(extras.tree({"data": {"_target_": "a.B", "root": None}, "seed": 3, "logger": {}}))
    printed = capsys.readouterr().out
    assert "_target_: a.B" in printed
    assert "seed: 3" in printed


@pytest.mark.parametrize(
    ("given", "name", "here"),
    [
        ("ckpt_path=a/checkpoints/last.ckpt", "train", "resume=a"),
        ("ckpt_path=a/checkpoints/last.ckpt", "eval", "checkpoint=a/checkpoints/last.ckpt"),
        ("task_name=mine", "train", "name=mine"),
        ("seed=1", "train", "seed=1"),
        ("--cfg", "train", "--cfg"),
    ],
)
def test_names_of_the_template_are_understood(given: str, name: str, here: str) -> None:
    assert cli.translated(given, name) == here


def test_variables_of_the_env_file_do_not_replace_those_that_are_set(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("# A comment=1\nexport B2_A='x y'\n\nB2_B=file\nB2_C=\n")
    monkeypatch.setattr(os, "environ", {"B2_B": "set"})
    cli.read_env_file(tmp_path / ".env")
    cli.read_env_file(tmp_path / "none")
    assert os.environ == {"B2_A": "x y", "B2_B": "set"}


def test_callbacks_and_experiments_compose_as_in_the_template(composed) -> None:
    cfg = composed("callbacks=[default,early_stopping,model_summary]", "logger=many_loggers", "trainer=ddp_sim")
    assert {"best", "last", "early_stopping", "model_summary"} <= set(cfg.callbacks)
    assert set(cfg.logger) == {"csv", "tensorboard", "wandb"}
    assert (cfg.trainer.devices, cfg.trainer.strategy) == (2, "ddp")
    assert "early_stopping" not in composed().callbacks
    assert composed("callbacks=none").callbacks == {}
    cfg = composed("experiment=cifar10/strong_base", "debug=limit", "trainer.max_epochs=2")
    assert (cfg.name, cfg.trainer.max_epochs, cfg.trainer.limit_val_batches, cfg.logger) == ("debug", 2, 2, {})
    assert cfg.trainer.precision == "32-true"


@pytest.mark.parametrize("debug", ["fdr", *(pytest.param(n, marks=pytest.mark.slow) for n in (
    "default", "limit", "overfit", "profiler"))])  # fmt: skip
def test_every_way_of_debugging_runs(composed, debug: str, tmp_path: Path) -> None:
    numbers = training.run(composed(*[part for part in TINY if part[:8] != "trainer."], f"debug={debug}"))
    assert "test/top1" in numbers
    assert (tmp_path / "run" / "report.json").exists()
