"""The command for a GPU, at toy size on the CPU, and its page."""

import json
from pathlib import Path

import pytest

from fewtokens.benchmarks import gpu
from fewtokens.errors import FewtokensError


@pytest.mark.slow  # a minute: it runs four commands
def test_the_smoke_run_writes_a_record_for_every_step_and_the_page(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("FEWTOKENS_OUTPUTS", str(tmp_path / "outputs"))
    out = tmp_path / "gpu"
    assert gpu.main(["smoke=true", f"out={out}"]) == 0
    records = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    assert set(records) == {"tests", "throughput", "train_step", "training"}
    assert {record["status"] for record in records.values()} == {"finished"}
    assert all(record["device"] and record["versions"]["torch"] and record["command"] for record in records.values())
    assert records["tests"]["tests"] > 0
    assert {row["tokenizer"] for row in records["throughput"]["records"]} >= {"none", "timm", "ats"}
    assert records["train_step"]["batch_size"] > 0
    assert records["training"]["report"]["test/top1"] >= 0
    assert sorted(path.name for path in out.iterdir()) == sorted(f"{name}.json" for name in records)
    text = (tmp_path / "gpu.md").read_text()
    assert all(f"## {name}" in text for name in records)
    assert "| 2 | none | ats |" in text


def test_epochs_follow_from_the_measured_time_per_step() -> None:
    step = {"batch_size": 500, "seconds_per_step": {"Lightning": [{"wall": 0.02}, {"wall": 0.01}]}}
    assert gpu.affordable_epochs(9.0, step) == 8  # 90 steps of 10 ms per epoch, in 80 % of the time
    assert gpu.affordable_epochs(1e6, step) == 100
    assert gpu.affordable_epochs(0.1, step) == 1
    assert gpu.affordable_epochs(9.0, {"status": "failed"}) == 1


def test_a_failed_or_slow_command_is_recorded_and_time_that_is_used_up_starts_none() -> None:
    assert gpu.run_command(["-c", "raise SystemExit(3)"], 60.0)["status"] == "failed with exit code 3"
    slow = gpu.run_command(["-c", "import time; time.sleep(60)"], 0.5)
    assert slow["status"] == "stopped after 0 s"
    assert slow["seconds"] < 30
    assert gpu.run_command(["-c", "raise SystemExit(3)"], 0.0)["status"] == "no time left"


def test_secrets_are_masked_in_recorded_commands() -> None:
    record = gpu.run_command(["train.py", "+api_key=0123456789", "logger=wandb"], 0.0)
    assert record["command"] == "python train.py '+api_key=***' logger=wandb"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smok=true"], "Unknown setting 'smok'. The settings are root, out, minutes, smoke"),
        (["minutes=0", "smoke=true"], "`minutes` must be a number > 0, got 0"),
        (["smoke=maybe"], "`smoke` must be true or false, got 'maybe'"),
    ],
)
def test_invalid_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(FewtokensError, match=message):
        gpu.parse(arguments)
    assert gpu.main(arguments) == 1
    assert capsys.readouterr().err.startswith(f"Error: {message.partition(', got')[0]}")


def test_without_a_gpu_only_the_smoke_run_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(FewtokensError, match=r"There is no GPU\. Set smoke=true"):
        gpu.parse([])
    assert gpu.parse(["smoke=true"])["minutes"] == 8.0
