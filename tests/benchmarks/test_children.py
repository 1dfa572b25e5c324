"""Runs as processes of their own."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fewtokens.benchmarks import children


def interrupt_when(path: Path) -> None:
    while not path.exists():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("starting", [True, False])
def test_an_interruption_lets_the_child_save(starting: bool, monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import pathlib, signal, time\n"
        "def save(*_):\n    pathlib.Path('saved').touch()\n    raise SystemExit(143)\n"
        "signal.signal(signal.SIGTERM, save)\npathlib.Path('ready').touch()\ntime.sleep(60)\n"
    )
    monkeypatch.setattr(children, "HOME", tmp_path)
    monkeypatch.chdir(tmp_path)
    start = subprocess.Popen

    def slow_start(*arguments: Any, **options: Any) -> subprocess.Popen:
        child = start(*arguments, **options)
        interrupt_when(tmp_path / "ready")
        return child

    if starting:
        monkeypatch.setattr(subprocess, "Popen", slow_start)
    else:
        threading.Thread(target=interrupt_when, args=[tmp_path / "ready"]).start()
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        children.run_child(["train.py"])
    assert (tmp_path / "saved").exists()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
