"""The table at the end of a run."""

import subprocess
from pathlib import Path

import pytest

from fewtokens.runs import report
from fewtokens.runs.config import instantiate
from fewtokens.runs.job import method_name
from fewtokens.runs.report import print_table

COST = {"cost/gmacs": 1.5, "cost/gmacs_dense": 2.0}
SPEED = {"throughput/images_per_s": 3200.0, "throughput/images_per_s_dense": 2000.0}
TRAINED = {"test/top1": 0.98, "train/seconds": 61.0}
CLIP = {"cost/frames": 32.0}
VIEWS = CLIP | {"cost/views": 12.0, "cost/gmacs_all_views": 18.0}


def lines(capsys, numbers: dict[str, float], method: str | None) -> list[str]:
    """Return the lines that are printed, without the borders of the table."""
    print_table(numbers, Path("run"), [Path("run/a.png")], method)
    shown = [
        " ".join(line.replace("│", " | ").replace("┃", " | ").split()) for line in capsys.readouterr().out.splitlines()
    ]
    return [line.strip("| ") for line in shown]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            {},
            ["GMACs per image | 2.0000 | 1.5000 | 25% fewer", "images per second | 2,000 | 3,200 | 1.60 times as fast"],
        ),
        ({"cost/gmacs": 2.5}, ["GMACs per image | 2.0000 | 2.5000 | 25% more"]),
        ({"cost/gmacs_std": 0.25}, ["GMACs per image | 2.0000 | 1.5000 ± 0.2500 | 25% fewer"]),
        ({"cost/gmacs_std": 0.0}, ["GMACs per image | 2.0000 | 1.5000 | 25% fewer"]),
        (
            CLIP,
            ["GMACs per clip | 2.0000 | 1.5000 | 25% fewer", "clips per second | 2,000 | 3,200 | 1.60 times as fast"],
        ),
        (VIEWS, ["GMACs per view | 2.0000 | 1.5000 | 25% fewer", "GMACs of all views | 24.0000 | 18.0000 | 25% fewer"]),
        ({"test/map": 0.125}, ["test mean average precision | | 12.50% |"]),
        (TRAINED, ["test accuracy | | 98.00% |", "training time (s) | | 61 |"]),
    ],
)
def test_all_tokens_and_the_method_stand_side_by_side(capsys, more: dict[str, float], expected: list[str]) -> None:
    shown = lines(capsys, COST | SPEED | more, "ToMe")
    assert "| all tokens | ToMe |".strip("| ") in shown
    assert [line.strip("| ") for line in expected if line.strip("| ") not in shown] == []
    assert any("tokenizer=none" in line for line in shown) == ("train/seconds" in more), "eval.py cannot train it"


@pytest.mark.parametrize("method", [None, "ToMe"])
def test_a_run_without_a_comparison_has_a_single_column(capsys, method: str | None) -> None:
    numbers = TRAINED | (COST | SPEED if method is None else {})  # a plain model, or measure=none
    shown = lines(capsys, numbers, method)
    assert "test accuracy | 98.00%" in shown
    assert ("GMACs per image | 1.5000" in shown) == ("images per second | 3,200" in shown) == (method is None)
    assert not any("all tokens" in line for line in shown)
    assert shown[-2:] == ["Picture: run/a.png", "Report: run/report.json"]


@pytest.mark.parametrize("skipped", [0.0, 3.0])
def test_skipped_videos_are_shown_if_there_are_any(capsys, skipped: float) -> None:
    counted = {"test/skipped": skipped} | ({"test/top1_of_listed": 0.9} if skipped else {})
    shown = lines(capsys, TRAINED | CLIP | counted, None)
    assert ("test videos that were skipped | 3" in shown) == bool(skipped)
    assert ("test accuracy, with those counted as wrong | 90.00%" in shown) == bool(skipped)


@pytest.mark.parametrize(("tokenizer", "name"), [("token_fuser", "TokenFuser"), ("none", None)])
def test_the_method_is_named_by_the_model(composed, tokenizer: str, name: str | None) -> None:
    assert method_name(instantiate(composed(f"tokenizer={tokenizer}").backbone)) == name


def test_the_commit_is_that_of_the_code_and_not_of_its_results(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(report, "__file__", str(tmp_path / "src" / "fewtokens" / "runs" / "report.py"))
    assert report.commit() is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *arguments], check=True)
    head = report.commit()
    assert head is not None
    assert len(head) >= 40
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results" / "a.json").touch()
    assert report.commit() == head
    (tmp_path / "docs" / "a.md").touch()
    assert report.commit() == f"{head}+changes"
