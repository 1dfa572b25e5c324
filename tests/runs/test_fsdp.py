"""Sharded training (FSDP2) in whole runs on two processes: its checkpoints are those of one process."""

import json
import os
import shutil
import socket
from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from conftest import TINY
from fewtokens.errors import FewtokensError
from fewtokens.runs import eval as evaluation
from fewtokens.runs import fsdp
from fewtokens.runs import train as training
from test_methods import HOOKED, both_ranks

SHARDED = ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"]
PLAIN = ["data.train_transforms=[]", "trainer.max_epochs=1", "measure=cost", "measure.cost.num_images=2"]
ONE, TWO = ["data.batch_size=32", "trainer=cpu"], ["data.batch_size=16", *SHARDED]


def run_as_rank(rank: int, folder: str, cfg: DictConfig, port: int) -> None:
    """Run a job as torchrun would start it."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0,
             "MASTER_PORT": port}  # fmt: skip
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}
    torch.set_num_threads(1)
    training.run(cfg)


@pytest.fixture
def two_processes(composed, tmp_path: Path):
    def run(*overrides: str, directory: str) -> Path:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        cfg = composed(*overrides, directory=directory)
        both_ranks(partial(run_as_rank, cfg=cfg, port=port), tmp_path)
        return tmp_path / directory

    return run


def content(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same(found: Path, expected: Path, atol: float = 2e-5) -> None:
    """Compare the weights and the state of the optimizer of two runs."""
    a, b = content(found), content(expected)
    assert (a["epoch"], a["global_step"]) == (b["epoch"], b["global_step"])
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for name, value in b["state_dict"].items():
        if name.startswith("model."):
            torch.testing.assert_close(a["state_dict"][name], value, rtol=1e-3, atol=atol)
    for one, two in zip(a["optimizer_states"], b["optimizer_states"], strict=True):
        assert [g["params"] for g in one["param_groups"]] == [g["params"] for g in two["param_groups"]]
        assert one["state"].keys() == two["state"].keys()
        for number, entries in two["state"].items():
            for name, value in entries.items():
                torch.testing.assert_close(one["state"][number][name], value, rtol=1e-2, atol=atol)


@pytest.mark.skipif(HOOKED, reason="runs in a process of its own, see tests/backbones/test_without_type_checks.py")
def test_a_sharded_run_goes_on_in_one_process_and_back(composed, two_processes, tmp_path: Path) -> None:
    settings = [*TINY, *PLAIN, "optimizer=sgd"]  # which does not amplify rounding errors of gradients that are zero
    training.run(composed(*settings, *ONE, directory="one"))
    shutil.copytree(tmp_path / "one", tmp_path / "whole")
    more = ["trainer.max_epochs=2"]
    training.run(composed(f"resume={tmp_path / 'whole'}", *more, directory="whole"))
    sharded = two_processes(*settings, *TWO, directory="sharded")
    assert_same(sharded, tmp_path / "one")
    numbers = evaluation.run(composed(f"checkpoint={sharded}", "trainer=cpu", base="eval", directory="evaluated"))
    report = json.loads((sharded / "report.json").read_text())
    assert numbers["test/top1"] == pytest.approx(report["test/top1"])
    assert numbers["cost/gmacs"] == report["cost/gmacs"]
    training.run(composed(f"resume={sharded}", "data.batch_size=32", "trainer=cpu", *TINY[-2:], *more,
                          directory="sharded"))  # fmt: skip
    assert_same(sharded, tmp_path / "whole")
    assert_same(two_processes(f"resume={tmp_path / 'one'}", *TWO, *TINY[-2:], *more, directory="one"),
                tmp_path / "whole")  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(HOOKED, reason="runs in a process of its own, see tests/backbones/test_without_type_checks.py")
@pytest.mark.parametrize(("optimizer", "atol"), [("muon", 2e-3), ("lamb", 1e-4), ("adamw optimizer.eps=1e-3", 1e-4)])
def test_a_sharded_step_of_every_other_optimizer(
    composed, two_processes, tmp_path: Path, optimizer: str, atol: float
) -> None:
    """Muon makes all singular values of a gradient one, so that rounding errors count where the gradient is zero."""
    settings = [*TINY, *PLAIN, *f"optimizer={optimizer}".split(" "), "test=false"]
    training.run(composed(*settings, *ONE, directory="one"))
    assert_same(two_processes(*settings, *TWO, directory="two"), tmp_path / "one", atol)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["trainer.precision=bf16-mixed"],
        ["task.compile=layers"],
        ["backbone.grad_checkpointing=true", "trainer.accumulate_grad_batches=2"],
    ],
)
def test_the_options_of_sharded_training(script, command, tmp_path: Path, options: list[str]) -> None:
    run = tmp_path / "run"
    script("train.py", *TINY, *SHARDED, *options, f"hydra.run.dir={run}")
    command("eval.py", f"checkpoint={run}", "trainer=cpu", f"hydra.run.dir={tmp_path / 'evaluated'}")


def test_settings_that_sharding_does_not_support_are_refused(composed) -> None:
    for override, words in (
        ("callbacks=ema", "`callbacks.ema` does not work with a sharded model"),
        ("trainer.precision=16-mixed", r"`trainer\.precision` must be '32-true' or"),
        ("trainer.num_sanity_val_steps=2", r"`trainer\.num_sanity_val_steps` must be 0"),
    ):
        cfg = composed("trainer=fsdp", override)
        callbacks = [fsdp.WeightAveraging()] if "ema" in override else []
        with pytest.raises(FewtokensError, match=words):
            fsdp.check_settings(cfg.trainer, callbacks)
