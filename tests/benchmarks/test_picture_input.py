"""The benchmark of the input pipelines for pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewtokens.benchmarks import image_input, picture_input


@pytest.mark.slow
def test_all_pipelines_are_measured_and_compared(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(image_input, "_SETTLING", 0.0)
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(4):
            small = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
            small.resize((400, 300), Image.Resampling.BICUBIC).save(tmp_path / "set" / name / f"{number}.jpg")
    command = f"{tmp_path / 'set'} --seconds 0.05 --rounds 2 --batch-size 2 --limit 8 --cold --write {tmp_path}/x.json"
    assert picture_input.main(command.split()) == 0
    found = json.loads((tmp_path / "x.json").read_text())
    assert [len(rates) for rates in found["images_per_s"].values()] == [2, 2, 2, 2]
    assert found["ratios"]["usual"] == 1.0
    assert found["pixels"]["folders, evaluation"] == [0.0, 0.0]
    assert found["pixels"]["shards, training"] == found["pixels"]["folders, training"]
    assert found["pixels"]["folders, training"][0] < 1
    assert "shards at 256, training" not in found["pixels"]
    assert found["pixels"]["shards at 256, evaluation"][0] < 5
    assert all(rate > 0 for rate in found["cold"].values())
    assert "shards at 256" in capsys.readouterr().out


def test_missing_pictures_end_with_a_sentence(tmp_path: Path, capsys) -> None:
    assert picture_input.main([str(tmp_path / "absent")]) == 1
    assert "absent does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ("--batch-size 5", "`--batch-size` must be at most 4, the pictures, got 5"),
        ("--limit 1 --batch-size 2", "`--batch-size` must be at most 1"),
        ("--limit 0", "`--limit` must be an int >= 1"),
        ("--rounds 0", "`--rounds` must be an int >= 1"),
        ("--seconds 0", "`--seconds` must be a number > 0"),
        ("--scratch absent", "`--scratch` must be a folder, got 'absent'"),
    ],
)
def test_arguments_that_would_wait_or_fail_later(tmp_path: Path, capsys, arguments: str, match: str) -> None:
    (tmp_path / "a").mkdir()
    for number in range(4):
        (tmp_path / "a" / f"{number}.jpg").touch()
    assert picture_input.main([str(tmp_path), *arguments.split()]) == 1
    assert match in capsys.readouterr().err
