"""The benchmark of the input pipelines."""

import json
from pathlib import Path

import pytest

from fewtokens.benchmarks import image_input


def test_both_pipelines_are_measured_in_every_round(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(image_input, "_SETTLING", 0.0)
    command = f"--generated --seconds 0.05 --rounds 2 --batch-size 64 --workers 0 --write {tmp_path / 'speed.json'}"
    assert image_input.main(command.split()) == 0
    found = json.loads((tmp_path / "speed.json").read_text())
    assert found["data"] == "random images"
    assert [len(rates) for rates in found["images_per_s"].values()] == [2, 2]
    assert found["lowest"] <= found["ratio"] <= found["highest"]
    assert f"ratio: {found['ratio']:.1f}" in capsys.readouterr().out


def test_missing_data_end_with_a_sentence(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(image_input, "measure", pytest.fail)
    assert image_input.main(["--root", str(tmp_path / "absent")]) == 1
    assert "absent, which does not exist" in capsys.readouterr().err
