"""The tables of the benchmark page."""

import json
from pathlib import Path

import pytest

from fewtokens.benchmarks import tables
from fewtokens.errors import FewtokensError
from suite_rows import suite_content

RECORD = {"tokenizer": "none", "batch": 16, "images_per_s": 10.0, "speedup_vs_dense": 1.0, "gmacs": 6.0,
          "gmacs_padded": 6.0, "realised_over_theoretical": 1.0}  # fmt: skip


def test_the_committed_page_has_the_tables_of_the_committed_results() -> None:
    text = tables.PAGE.read_text()
    assert tables.BLOCK.search(text)
    assert tables.filled(text, tables.RESULTS) == text, "run python -m fewtokens.benchmarks.tables"


def test_a_table_is_replaced_and_the_text_around_it_stays(tmp_path: Path) -> None:
    records = [RECORD, RECORD | {"tokenizer": "tome build.r=2", "speedup_vs_dense": 1.5}]
    (tmp_path / "trained_attention.json").write_text(json.dumps(records))
    page = "Before.\n<!-- table: trained_attention -->\nold\n<!-- end -->\nAfter.\n"
    text = tables.filled(page, tmp_path)
    assert text.startswith("Before.\n<!-- table: trained_attention -->\n\n| batch | method |")
    assert "| 16 | tome r=2 | 10.0 | 1.50 | 6.00 | 6.00 | 1.00 |" in text
    assert text.endswith("|\n\n<!-- end -->\nAfter.\n")
    assert "old" not in text
    assert tables.filled(text, tmp_path) == text


def test_records_of_several_processes_are_one_row_with_the_median_and_the_range_of_the_speed_up() -> None:
    records = [RECORD | {"batch": batch, "tokenizer": "ats", "speedup_vs_dense": speed, "images_per_s": 10 * speed}
               for speed in (1.6, 1.4, 1.5) for batch in (16, 1)]  # fmt: skip
    rows = tables.speed([RECORD, *records, RECORD, RECORD])
    assert rows[1] == ["16", "dense", "10.0", "1.00", "6.00", "6.00", "1.00"]
    assert rows[2:] == [[b, "ats", "15.0", "1.50 (1.40 to 1.60)", "6.00", "6.00", "1.00"] for b in ("16", "1")]


def test_an_unknown_table_and_a_missing_result_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FewtokensError, match="'nothing'"):
        tables.filled("<!-- table: nothing -->\n<!-- end -->", tmp_path)
    with pytest.raises(FewtokensError, match=r"needs surveillance\.json.*sh docs/results/surveillance\.sh"):
        tables.filled("<!-- table: surveillance -->\n<!-- end -->", tmp_path)


def test_every_table_has_the_script_that_an_error_names() -> None:
    for file, _ in tables.TABLES.values():
        assert (tables.RESULTS / file).with_suffix(".sh").is_file()


def test_clips_have_means_over_splits_and_their_speed() -> None:
    def run(split: int, top1: float, **other: str) -> dict:
        numbers = {"test/top1": top1, "test/videos": 100.0, "cost/gmacs": 20.0, "cost/gmacs_std": 1.5}
        row = {"model": "1", "method": "ats build.budget=8", "training": "10 epochs", "split": split, "report": numbers}
        return row | other

    runs = [run(0, 0.8), run(0, 0.7, model="2"), run(1, 0.9), run(0, 0.6, training="off the shelf")]
    runs += [run(2, 0.9, method="none"), run(1, 0.84, method="none"), run(0, 0.75, method="none")]
    runs += [run(0, 0.5, method="none", model="1, one frame")]
    speed = [{"model": "1", "tokenizer": "ats build.budget=8", "speedup_vs_dense": s} for s in (1.5, 1.25, 1.75)]
    rows = tables.clips({"runs": runs, "speed": speed})
    numbers = ["20.00 ± 1.50", "1.50 (1.25 to 1.75)"]
    assert rows[1] == ["1", "ats budget=8", "10 epochs", "85.0% ± 63.5", "+5.5 ± 6.4", *numbers, "2"], (
        "12.71 std. errors"
    )
    assert rows[2] == ["1", "ats budget=8", "off the shelf", "60.0% ± 9.4", "-15.0", *numbers, "1"], (
        "Wilson's for one split"
    )
    assert rows[3] == ["1", "dense", "10 epochs", "83.0% ± 18.8", "-", "20.00 ± 1.50", "-", "3"]
    assert rows[4] == ["1, one frame", "dense", "10 epochs", "50.0% ± 9.6", "-25.0", "20.00 ± 1.50", "-", "1"]
    assert rows[5] == ["2", "ats budget=8", "10 epochs", "70.0% ± 8.8", "-", "20.00 ± 1.50", "-", "1"], "no dense model"


def test_the_overview_has_a_row_for_every_method() -> None:
    rows = tables.overview(suite_content())
    assert [row[0] for row in rows[1:]] == [
        "dense", "tome r=[1,2]", "token_learner at=3 num_tokens=8", "token_learner at=6 num_tokens=8", "ats",
    ]  # fmt: skip
    assert rows[5] == ["ats", "80.0%", "75.0%", "70.0%", "-", "-", "-", "-"], "it was not trained"
    assert rows[2] == ["tome r=[1,2]", "88.0%", "87.0%", "86.0%", "85.0%", "87.0% ± 12.7", "1.000", "1.90"]
