"""Signals outside of a training step. What happens within is tested with whole runs in tests/runs."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import TINY, environment
from fewtokens.callbacks.signals import Stopped
from fewtokens.runs import train as training
from fewtokens.tasks.classification import Classifier

# Sends the same signal twice to forks of one process, since every process of its own would import Lightning again.
TWO_SIGNALS = """
import os, signal, sys
from fewtokens.callbacks.signals import StopOnSignal

def send_twice(name):
    stop = StopOnSignal("run/checkpoints/last.ckpt")
    stop.on_train_start(None, None)
    for _ in range(2):
        os.kill(os.getpid(), getattr(signal, name))
        print("received", stop.received, flush=True)

for case in sys.argv[1:]:
    print(f"= {case}", flush=True)
    print(f"= {case}", file=sys.stderr, flush=True)
    if os.fork() == 0:
        name, _, setting = case.partition(" ")
        if setting == "torchrun":
            os.environ["TORCHELASTIC_RUN_ID"] = "0"
        if setting == "ignored":  # as under nohup
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        send_twice(name)
        os._exit(0)
    print("exit code", os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_two_signals() -> None:
    """Only a second Ctrl-C ends at once, but not the one that torchrun sends; an ignored signal stays ignored."""
    cases = ["SIGINT", "SIGINT torchrun", "SIGTERM", "SIGHUP ignored"]
    command = [sys.executable, "-c", TWO_SIGNALS, *cases]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(), timeout=300)
    printed = dict(part.split("\n", 1) for part in done.stdout.split("= ")[1:])
    assert printed == {
        "SIGINT": f"received 2\nexit code {-signal.SIGINT}\n",
        "SIGINT torchrun": "received 2\nreceived 2\nexit code 0\n",
        "SIGTERM": "received 15\nreceived 15\nexit code 0\n",
        "SIGHUP ignored": "received 0\nreceived 0\nexit code 0\n",
    }
    errors = dict(part.split("\n", 1) for part in done.stderr.split("= ")[1:])
    assert "Press Ctrl-C again to end at once" in errors["SIGINT"]


def test_a_signal_in_the_last_validation_is_not_forgotten(composed, tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "on_validation_epoch_start", lambda _: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped) as stopped:
            training.run(composed(*TINY))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "stopped"
    assert not (tmp_path / "run" / "report.json").exists()
    assert {"val/top1", "test/top1"} <= training.run(composed(f"resume={tmp_path / 'run'}")).keys()


@pytest.mark.parametrize(("batches", "ready"), [(3, 4), (5, 5)])
def test_a_signal_waits_for_the_step_and_at_the_end_of_an_epoch_for_its_validation(
    composed, tmp_path: Path, monkeypatch, batches: int, ready: int
) -> None:
    """Gradients are accumulated over two batches, and an epoch has five."""
    seen: list[int] = []

    def step(*_: object) -> None:
        seen.append(1)
        if len(seen) == batches:
            os.kill(os.getpid(), signal.SIGTERM)

    settings = ["trainer.max_epochs=2", "trainer.limit_train_batches=5", "trainer.accumulate_grad_batches=2"]
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "on_train_batch_start", step, raising=False)
        with pytest.raises(Stopped):
            training.run(composed(*TINY, *settings, "test=false"))
    content = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert len(seen) == content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"] == ready
    assert ("val/loss" in content["numbers"]) == (ready == 5)


def test_the_step_of_the_stop_is_logged_once(composed, tmp_path: Path, monkeypatch) -> None:
    seen: list[int] = []

    def step(*_: object) -> None:
        seen.append(1)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    settings = ["trainer.limit_train_batches=4", "trainer.log_every_n_steps=1", "test=false"]
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "on_train_batch_start", step, raising=False)
        with pytest.raises(Stopped):
            training.run(composed(*TINY, *settings))
    training.run(composed(f"resume={tmp_path / 'run'}"))
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert steps == [0, 1, 2, 3]
