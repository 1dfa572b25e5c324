"""Complete runs on videos of which some are broken: the counts in the report, and skipped.csv."""

import csv
import json
from pathlib import Path

import pytest

import videos
from fewtokens.data.skipped import Skipped
from fewtokens.errors import FewtokensError
from fewtokens.runs import eval as evaluation
from fewtokens.runs import skipped_videos
from fewtokens.runs import train as training

TINY = [
    "data=kinetics400",
    "data.num_classes=2",
    "data.image_size=32",
    "data.resize=32",
    "data.scale_jitter=[1,1]",
    "data.frames=4",
    "data.views=[2,3]",
    "data.decoder=pyav",
    "data.batch_size=2",
    "data.num_workers=0",
    "data.max_broken=0.5",
    "backbone=vivit_mini",
    "backbone.dim=16",
    "backbone.heads=2",
    "backbone.depth=2",
    "backbone.pool=avg",
    "backbone.tubelets.height=16",
    "backbone.tubelets.width=16",
    "tokenizer.at=1",
    "tokenizer.build.num_tokens=2",
    "trainer.max_epochs=1",
    "measure=none",
    "name=videos",
]


def test_a_run_says_what_it_could_not_read_and_how_it_counted(composed, tmp_path: Path, caplog) -> None:
    root = videos.write_folders(tmp_path / "set")
    report = training.run(composed(*TINY, f"data.root={root}", "trainer=cpu"))
    assert report["test/videos"] == 2
    assert report["test/skipped"] == report["data/test_skipped"] == report["data/train_skipped"] == 1
    assert report["data/train_replaced"] == 1
    assert report["test/top1_of_listed"] == pytest.approx(report["test/top1"] * 2 / 3)
    with open(tmp_path / "run" / "skipped.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["part"], row["path"]) for row in rows] == [
        ("test", "val/b/0.mp4"),
        ("train", "train/b/1.mp4"),
        ("val", "val/b/0.mp4"),
    ]
    assert all(row["reason"] for row in rows)
    assert any("over the 2 videos that were read, without the 1 skipped" in record.message for record in caplog.records)


def test_a_run_that_ends_for_its_broken_videos_names_them(composed, tmp_path: Path) -> None:
    root = videos.write_folders(tmp_path / "set")
    with pytest.raises(FewtokensError, match=r"more than data\.max_broken=0 allows"):
        training.run(composed(*TINY, f"data.root={root}", "trainer=cpu", "data.max_broken=0.0"))
    with open(tmp_path / "run" / "skipped.csv") as file:
        assert [(row["part"], row["path"]) for row in csv.DictReader(file)] == [("train", "train/b/1.mp4")]


def test_a_run_without_a_readable_video_names_all(composed, tmp_path: Path) -> None:
    root = videos.write_folders(tmp_path / "set")
    for file in (root / "train").rglob("*.mp4"):
        file.write_bytes(b"no video")
    with pytest.raises(FewtokensError, match="4 training videos in a row cannot be read"):
        training.run(composed(*TINY, f"data.root={root}", "trainer=cpu", "data.max_broken=1.0"))
    with open(tmp_path / "run" / "skipped.csv") as file:
        assert len(list(csv.DictReader(file))) == 4


def test_skipped_csv_holds_file_names_of_any_kind(tmp_path: Path) -> None:
    skipped = [Skipped("test", name, "there is no such file") for name in ("a\r.mp4", "a,\n.mp4", "\udcff.mp4")]
    skipped_videos._write(tmp_path / "skipped.csv", skipped)
    with open(tmp_path / "skipped.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        assert [Skipped(*row) for row in csv.reader(file)][1:] == skipped


def test_a_measured_run_counts_its_views_and_shows_tokens_over_time(composed, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    root = videos.write_folders(tmp_path / "set")
    measured = ["measure=default", "measure.throughput.seconds=0.1", "callbacks=pictures", "logger=wandb"]
    every = "callbacks.pictures.every_n_epochs=1"
    report = training.run(composed(*TINY, f"data.root={root}", "trainer=cpu", *measured, every))
    assert (report["cost/frames"], report["cost/views"]) == (4, 6)
    assert report["cost/gmacs_all_views"] == pytest.approx(6 * report["cost/gmacs"])
    assert report["cost/images"] == 2, "one view each, and not the broken one"
    pictures = {path.name for path in (tmp_path / "run" / "pictures").iterdir()}
    over_time = {"token_maps_over_time.png", "token_maps_over_time.gif"}
    assert pictures == over_time | {"epoch_1.png", "epoch_1.gif", "token_maps.png", "confusion.png"}
    kept = {path.parent.name for path in (tmp_path / "run").glob("wandb/offline-run-*/files/media/videos/*/*.gif")}
    assert kept == {"test", "val"}


def test_two_processes_count_every_video_once_with_all_its_views(script, composed, tmp_path: Path) -> None:
    root = videos.write_folders(tmp_path / "set")
    script("train.py", *TINY, f"data.root={root}", "trainer=ddp_cpu")
    (run,) = (tmp_path / "outputs" / "videos").iterdir()
    report = json.loads((run / "report.json").read_text())
    assert report["test/videos"] == 2
    assert report["test/skipped"] == 1
    assert report["data/train_replaced"] == 1
    again = composed(f"checkpoint={run}", "trainer=cpu", "measure=none", base="eval", directory="again")
    alone = evaluation.run(again)
    assert {n: v for n, v in alone.items() if n.startswith("test/")} == pytest.approx(
        {n: v for n, v in report.items() if n.startswith("test/")}, abs=1e-6
    )


def test_several_actions_a_video(composed, tmp_path: Path) -> None:
    root = videos.write_folders(tmp_path / "set")
    (root / "Charades_v1_train.csv").write_text('id,actions\n0,"c000 0 1;c003 0.5 1"\n1,c001 0 1\n')
    (root / "Charades_v1_test.csv").write_text('id,actions\n0,"c000 0 1;c003 0.5 1"\nnowhere,c001 0 1\n')
    settings = [part for part in TINY if not part.startswith("data=")] + ["data=charades", "data.num_classes=4"]
    report = training.run(composed(*settings, f"data.root={root}", "trainer=cpu", "task=multilabel"))
    assert 0 <= report["test/map"] <= 1
    assert report["test/skipped"] == report["test/videos"] == 1
    assert "test/top1_of_listed" not in report


def test_a_test_without_a_readable_video_is_an_error(composed, tmp_path: Path) -> None:
    root = videos.write_folders(tmp_path / "set")
    (root / "test.txt").write_text("val/b/0.mp4 1\nnowhere.mp4 0\n")
    cfg = composed(*TINY, f"data.root={root}", "data.parts.test=test.txt", "trainer=cpu", base="eval")
    with pytest.raises(FewtokensError, match="None of the 2 test videos"):
        evaluation.run(cfg)
    assert "nowhere.mp4" in (tmp_path / "run" / "skipped.csv").read_text()
