import csv
import json
from pathlib import Path

import pytest
import yaml

from fewtokens.benchmarks.pareto import main
from fewtokens.benchmarks.tradeoff import DENSE, Point, accuracy_at, frontier, read_points


def point(method: str, accuracy: float, gmacs: float, speedup: float | None = None) -> Point:
    return Point(method, "", accuracy, float(gmacs), gmacs / 10, speedup, None, None, None)


def run(folder: Path, target: str, numbers: dict[str, float], *overrides: str) -> None:
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(numbers))
    (folder / "run.json").write_text(json.dumps({"command": " ".join(["python eval.py", *overrides]), "device": "CPU"}))
    (folder / "config.yaml").write_text(yaml.safe_dump({"tokenizer": {"build": {"_target_": target}}}))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder, dense = tmp_path / "runs", {"cost/gmacs_dense": 10.0}
    run(folder / "0", "fewtokens.tokenizers.base.Tokenizer", {"test/top1": 0.9, "cost/gmacs": 10.0,
        "throughput/speedup": 1.0, "throughput/images_per_s": 50.0} | dense)  # fmt: skip
    for index, (r, top1, gmacs, speedup) in enumerate([(1, 0.88, 8.0, 1.2), (2, 0.8, 5.0, 1.9)]):
        numbers = {"test/top1": top1, "cost/gmacs": gmacs, "throughput/speedup": speedup}
        run(folder / f"{index + 1}", "fewtokens.tokenizers.tome.ToMe", numbers | dense, f"tokenizer.build.r={r}")
    run(folder / "9", "x.ATS", {"test/top1": 0.5})
    return folder


def test_points_come_from_the_reports_alone(runs: Path) -> None:
    points, skipped = read_points([runs], "test/top1")
    assert [(p.method, p.setting, p.accuracy, p.share) for p in points] == [
        (DENSE, "", 0.9, 1.0),
        ("ToMe", "r=1", 0.88, 0.8),
        ("ToMe", "r=2", 0.8, 0.5),
    ]
    assert points[1].images_per_s is None
    [reason] = skipped
    assert "cost/gmacs" in reason
    assert str(runs / "9") in reason


def test_settings_that_are_words_make_another_method(tmp_path: Path) -> None:
    numbers = {"test/top1": 0.5, "cost/gmacs": 1.0, "cost/gmacs_dense": 2.0}
    run(
        tmp_path / "a",
        "x.EViT",
        numbers,
        "tokenizer=evit",
        "tokenizer.build.normalize=true",
        "tokenizer.build.keep_rate=0.5",
    )
    run(tmp_path / "b", "x.ATS", numbers, "tokenizer.build.budget=all", "'tokenizer.at=[3,6]'")
    points, _ = read_points([tmp_path], "test/top1")
    assert [(p.method, p.setting) for p in points] == [
        ("ATS", "budget=all at=[3,6]"),
        ("EViT (normalize=true)", "keep_rate=0.5"),
    ]


def test_the_frontier_is_what_no_other_beats() -> None:
    cheap, good, beaten, twin = point("a", 0.5, 1), point("b", 0.9, 5), point("c", 0.8, 6), point("d", 0.9, 5)
    assert frontier([cheap, good, beaten, twin], lambda p: p.gmacs) == {cheap, good, twin}


def test_methods_are_compared_on_lines_between_their_points_and_not_beyond() -> None:
    points = [point(DENSE, 0.9, 10), point("a", 0.8, 6), point("a", 0.6, 4), point("b", 0.7, 9)]
    assert accuracy_at(points, lambda p: p.share, 0.5) == {"a": pytest.approx(0.7)}
    assert accuracy_at(points, lambda p: p.share, 0.95) == {"a": pytest.approx(0.8875), "b": pytest.approx(0.8)}
    assert accuracy_at(points, lambda p: p.share, 0.3) == {}
    assert accuracy_at(points, lambda p: p.share, 0.392) == {"a": 0.6}  # the last point is near enough
    assert accuracy_at(points, lambda p: p.share, 0.385) == {}
    assert accuracy_at(points, lambda p: p.speedup, 1.0) == {}


def test_the_command_writes_points_plot_and_tables(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(runs), "--write", str(tmp_path / "out" / "table")]) == 0
    printed = capsys.readouterr()
    assert "Skipped: " in printed.err
    with (tmp_path / "out" / "table.csv").open() as file:
        assert [row["method"] for row in csv.DictReader(file)] == [DENSE, "ToMe", "ToMe"]
    assert (tmp_path / "out" / "table.png").stat().st_size > 5000
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| ToMe | r=1 | 88.00% | 8.0000 | 80% | 1.20 | - | yes | yes |" in text
    assert "| ToMe | 89.00% | 88.00% | 85.33% | 82.67% | 80.00% |" in text
    assert "1.2 x" in text
    again = [str(tmp_path / "out" / "table.csv"), "--write", str(tmp_path / "again" / "table")]
    assert main(again) == 0
    old = tmp_path / "out" / "table.csv"
    old.with_name("old.csv").write_text(old.read_text().replace(",measured_on", ",device", 1))
    assert read_points([old.with_name("old.csv")], "test/top1") == read_points([old], "test/top1")
    for suffix in (".csv", ".md", ".png"):
        first, second = (tmp_path / folder / f"table{suffix}" for folder in ("out", "again"))
        assert second.read_bytes() == first.read_bytes(), "the csv alone gives the same page"
    capsys.readouterr()
    main([str(runs), "--cost-only"])
    assert "1.2 x" not in capsys.readouterr().out
    main([str(runs / "0")])  # the dense model alone
    assert "At equal" not in capsys.readouterr().out


def test_errors_are_sentences(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(tmp_path)]) == 1
    assert "There is no report.json" in capsys.readouterr().err
    run(tmp_path / "a", "x.ATS", {"test/top1": 0.5})
    assert main([str(tmp_path)]) == 1
    assert "measure=default" in capsys.readouterr().err
    (tmp_path / "a" / "report.json").write_text("[1")
    assert main([str(tmp_path)]) == 1
    assert "must be a json object" in capsys.readouterr().err
    (tmp_path / "points.csv").write_text("method,accuracy\na,0.5\n")
    assert main([str(tmp_path / "points.csv")]) == 1
    assert "must be a csv file written by --write" in capsys.readouterr().err


def test_the_device_is_that_of_the_measures(tmp_path: Path) -> None:
    run(tmp_path / "a", "x.ATS", {"test/top1": 0.5, "cost/gmacs": 1.0, "cost/gmacs_dense": 2.0})
    about = json.loads((tmp_path / "a" / "run.json").read_text())
    (tmp_path / "a" / "run.json").write_text(json.dumps(about | {"device": "8 x GPU", "measured_on": "CPU"}))
    assert read_points([tmp_path], "test/top1")[0][0].measured_on == "CPU"
