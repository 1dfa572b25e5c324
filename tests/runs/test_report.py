"""The table at the end of a run."""

from pathlib import Path

import pytest

from fewtokens.runs.report import print_table

COST = {"cost/gmacs": 1.5, "cost/gmacs_dense": 2.0, "throughput/images_per_s": 0.25}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, ["GMACs per image, with the tokenizer", "images/s"]),
        ({"test/map": 0.125}, ["test mean average precision │ 12.50%"]),
        ({"cost/frames": 32.0}, ["GMACs per clip, with the tokenizer", "clips/s"]),
        (
            {"cost/frames": 32.0, "cost/views": 12.0, "cost/gmacs_all_views": 18.0},
            ["GMACs per view, all tokens │ 2.0000", "views of a sample │ 12", "GMACs of all its views", "│ 18.0000"],
        ),
    ],
)
def test_the_table_says_what_the_cost_is_of(tmp_path: Path, capsys, more: dict[str, float], words: list[str]) -> None:
    print_table(COST | more, tmp_path, [])
    shown = " ".join(capsys.readouterr().out.split())
    assert [word for word in words if word not in shown] == []
