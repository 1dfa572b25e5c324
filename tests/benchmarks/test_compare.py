"""The page that compares runs."""

from pathlib import Path

import pytest

from fewtokens.benchmarks.compare import curves, main, of_data_set, pictures
from fewtokens.benchmarks.rows import Row, differences, find_runs, read_rows
from fewtokens.errors import FewtokensError
from saved_runs import CONFIG, METRICS, Page, save_picture, save_run

DENSE = {"tokenizer": {"at": [], "build": {"_target_": "fewtokens.tokenizers.base.Tokenizer"}}}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Three seeds of a method, and the dense model."""
    for seed, top1 in enumerate((0.7, 0.8, 0.9)):
        save_run(tmp_path / "runs" / f"tome_{seed}", {"test/top1": top1}, seed=seed)
    save_run(tmp_path / "runs" / "dense", {"test/top1": 0.85, "cost/gmacs": 10.0, "throughput/speedup": 1.0,
                                           "throughput/images_per_s": 40.0}, config=DENSE)  # fmt: skip
    return tmp_path / "runs"


def rows_of(folder: Path) -> list[Row]:
    return read_rows(find_runs([folder]))[0]


def test_runs_that_differ_in_the_seed_alone_are_one_row(runs: Path) -> None:
    dense, tome = rows_of(runs)
    assert (dense.label, tome.label) == ("dense", "ToMe")
    assert [run.about["seed"] for run in tome.runs] == ["0", "1", "2"]
    assert dense.text("test/top1", ".2%") == "85.00%"
    # deviation 0.1, and 4.303 from a printed table of t with 2 degrees of freedom: 0.1 * 4.303 / sqrt(3)
    assert tome.text("test/top1", ".2%") == "80.00% ± 24.84%"
    point = tome.point("test/top1")
    assert point is not None
    assert (point.accuracy, point.share, point.speedup) == (pytest.approx(0.8), 0.5, 1.5)


@pytest.mark.parametrize(
    "other",
    [
        {"config": {"optimizer": {"lr": 0.2, "betas": [0.9, 0.999]}}},
        {"about": {"commit": "decaf"}},
        {"about": {"device": "GPU"}},
        {"about": {"versions": {"torch": "2.1"}}},
        {"about": {"status": "failed"}},
        {"about": {"command": "python eval.py checkpoint=x"}},
        {"seed": 0},
    ],
)
def test_what_else_differs_is_a_row_of_its_own(tmp_path: Path, other: dict) -> None:
    save_run(tmp_path / "a", seed=0)
    save_run(tmp_path / "b", **({"seed": 1} | other))
    assert len(rows_of(tmp_path)) == 2


def test_only_what_differs_is_listed(runs: Path) -> None:
    save_run(runs / "other", config={"optimizer": {"lr": 0.2, "betas": [0.9, 0.999]}})
    found = dict(differences(rows_of(runs)))
    assert found["optimizer.lr"] == [("0.1", False), ("0.2", True), ("0.1", False)]
    assert found["tokenizer.build.r"] == [("not set", True), ("2", False), ("2", False)]
    assert set(found) == {"optimizer.lr", "tokenizer.at", "tokenizer.build._target_", "tokenizer.build.r"}


def test_the_page_of_several_runs(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_run(runs / "failed", about={"status": "failed", "reason": "<script>alert(1)</script> diverged"})
    (runs / "failed" / "report.json").write_text("{")
    page = tmp_path / "out" / "compare.html"
    assert main([str(runs), str(runs / "dense"), "--write", str(page)]) == 0
    printed = capsys.readouterr()
    assert f"Page: {page}" in printed.out
    assert "report.json must be a json object" in printed.err
    shown = Page(page)
    shown.check()
    for words in ("5 runs of 3 settings", "80.00% ± 24.84%", "A dense", "C ToMe", "<script>alert(1)</script> diverged",
                  "Best at its cost: A, C.", "Best at its speed: A, C.", "Not in the plots"):  # fmt: skip
        assert words in shown.text, words
    assert len(shown.all("img")) == 3, "of the first run of every row"
    assert len(shown.source) < 200_000


def test_runs_of_different_data_sets_have_plots_of_their_own(runs: Path, tmp_path: Path) -> None:
    other = {"data": CONFIG["data"] | {"_target_": "fewtokens.data.image.cifar10.Cifar10"}}
    save_run(runs / "other", config=other, about={"choices": {"data": "cifar10"}})
    main([str(runs), "--write", str(tmp_path / "compare.html")])
    shown = Page(tmp_path / "compare.html")
    assert "The runs have 2 data sets" in shown.text
    assert shown.text.count("Best at its cost") == 2
    save_picture(runs / "dense" / "pictures" / "confusion.png")
    headings = ["token_maps.png, digits", "token_maps.png, cifar10", "confusion.png, digits"]
    assert list(pictures(rows_of(runs), tmp_path / "x.html")) == headings


def test_speeds_of_different_devices_are_not_compared(runs: Path) -> None:
    save_run(runs / "gpu", about={"device": "8 x GPU", "measured_on": "GPU"})
    found = of_data_set(rows_of(runs), "test/top1")
    assert len(found.charts) == 1
    assert "measured on different devices" in found.sentences[-1]


def test_curves_of_all_runs_are_on_one_chart(runs: Path) -> None:
    (runs / "tome_1" / "metrics.csv").write_text(METRICS.replace("val/top1", "val/other"))
    charts = curves(rows_of(runs))
    assert [(chart.title, len(chart.series)) for chart in charts] == [
        ("Loss, validation", 4),
        ("Loss, training", 4),
        ("Accuracy, validation", 3),
        ("other, validation", 1),
    ]
    assert [one.label for one in charts[0].legend] == ["A dense", "B ToMe"]


def test_one_run_and_another_metric(tmp_path: Path) -> None:
    save_run(tmp_path / "run", {"test/map": 0.25})
    for metric, words in (("test/map", "25.00%"), ("test/none", "Not in the plots, without test/none and cost: A.")):
        assert main([str(tmp_path / "run"), "--write", str(tmp_path / "c.html"), "--metric", metric]) == 0
        shown = Page(tmp_path / "c.html")
        shown.check()
        assert words in shown.text
        assert "There is one row only" in shown.text


def test_a_config_that_cannot_be_read_is_shown_as_a_problem(tmp_path: Path) -> None:
    for name in "ab":
        save_run(tmp_path / name)
        (tmp_path / name / "config.yaml").write_text("a: &a [*a]")
    rows, problems = read_rows(find_runs([tmp_path]))
    assert len(rows) == len(problems) == 2
    assert [row.label for row in rows] == ["unknown (a)", "unknown (b)"]


def test_bad_input_is_answered_with_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "missing", tmp_path / "file", tmp_path / "run" / "pictures"):
        assert main([str(tmp_path / "run"), str(path)]) == 1
        assert f"{path} is not the directory of a run" in capsys.readouterr().err
    assert main([str(tmp_path / "run"), "--write", str(tmp_path / "file" / "c.html")]) == 1
    assert "Cannot write" in capsys.readouterr().err
    with pytest.raises(FewtokensError):
        find_runs([tmp_path / "missing"])
