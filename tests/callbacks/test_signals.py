"""Signals outside of a training step. What happens within is tested with whole runs in tests/runs."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import TINY, environment
from fewtokens.callbacks.signals import Stopped
from fewtokens.runs import train as training
from fewtokens.tasks.classification import Classifier

TWO_SIGNALS = """
import os, signal, sys
from fewtokens.callbacks.signals import StopOnSignal

stop = StopOnSignal("run/checkpoints/last.ckpt")
stop.on_train_start(None, None)
for _ in range(2):
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    print("received", stop.received, flush=True)
"""


def send_twice(name: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", TWO_SIGNALS, name]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment(**more), timeout=60)


def test_a_second_ctrl_c_ends_at_once() -> None:
    done = send_twice("SIGINT")
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "received 2\n")
    assert "Press Ctrl-C again to end at once" in done.stderr


def test_the_second_ctrl_c_that_torchrun_sends_does_not() -> None:
    assert send_twice("SIGINT", TORCHELASTIC_RUN_ID="0").stdout == "received 2\nreceived 2\n"


def test_a_second_sigterm_does_not() -> None:
    assert send_twice("SIGTERM").stdout == "received 15\nreceived 15\n"


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup; child processes inherit it
    try:
        assert send_twice("SIGHUP").stdout == "received 0\nreceived 0\n"
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_in_the_last_validation_is_not_forgotten(composed, tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "on_validation_epoch_start", lambda _: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped) as stopped:
            training.run(composed(*TINY))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "stopped"
    assert not (tmp_path / "run" / "report.json").exists()
    assert {"val/top1", "test/top1"} <= training.run(composed(f"resume={tmp_path / 'run'}")).keys()
