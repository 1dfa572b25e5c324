"""The video quick start. moving_digits cannot be learned from single frames, and all video models learn it."""

import json
import shutil
from pathlib import Path

import pytest

from fewtokens.errors import FewtokensError
from fewtokens.runs import eval as evaluation
from fewtokens.runs import train as training

START = "experiment=video/quickstart"
STILLS = ["data.frames=1", "backbone.tubelets.frames=1"]
FEW = [
    "data.video_frames=8",
    "data.copies=1",
    "data.num_workers=0",
    "backbone.dim=16",
    "backbone.heads=2",
    "backbone.depth=2",
    "trainer=cpu",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=3",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=2",
    "~measure.throughput",
    "measure.cost.num_images=16",
]


@pytest.mark.slow
def test_the_quick_start_leaves_a_report_and_a_picture_of_its_tokens(composed, all_videos: Path, tmp_path) -> None:
    numbers = training.run(composed(START, f"data.root={all_videos}", *FEW))
    run = tmp_path / "run"
    assert json.loads((run / "report.json").read_text()) == pytest.approx(numbers)
    assert 0 <= numbers["test/top1"] <= 1
    assert numbers["test/videos"] == 128
    assert numbers["test/skipped"] == 0
    assert numbers["cost/tokens_last_block"] == 4 * 8  # time steps x learned tokens
    assert numbers["cost/gmacs"] < numbers["cost/gmacs_dense"]
    for name in ("token_maps.png", "token_maps_over_time.png", "token_maps_over_time.gif", "confusion.png"):
        assert (run / "pictures" / name).stat().st_size > 10_000
    again = composed(f"checkpoint={run}", "measure=none", base="eval", directory="eval")
    assert evaluation.run(again)["test/top1"] == pytest.approx(numbers["test/top1"])


def test_changed_videos_and_a_wrong_num_classes_are_errors(composed, all_videos: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(all_videos, tmp_path / "copied"))
    next(root.glob("v1-8-frames-1-copies/train/up/*.mp4")).unlink()
    with pytest.raises(FewtokensError, match="Delete this folder to have it written again"):
        training.run(composed(START, f"data.root={root}", *FEW))
    with pytest.raises(FewtokensError, match=r"num_classes"):
        training.run(composed(START, f"data.root={all_videos}", *FEW, "data.num_classes=7"))


def trained(composed, root: Path, *more: str) -> float:
    few = ["trainer=cpu", "trainer.max_epochs=4", "measure=none"]
    cfg = composed(START, f"data.root={root}", *few, *more, directory="_".join(["run", *more]))
    return training.run(cfg)["test/top1"]


@pytest.mark.slow
def test_a_model_trained_on_stills_fails_and_one_trained_on_clips_succeeds(composed, all_videos: Path) -> None:
    stills = trained(composed, all_videos, *STILLS)
    image_model = ["data.frames=1", "backbone=vit_mini", "backbone.patch_size=4"]
    assert stills < 0.18  # chance is 0.125, its standard error on 600 videos 0.0135
    assert trained(composed, all_videos, *image_model) < 0.18
    assert trained(composed, all_videos) > 0.8


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        "spatio_temporal",
        "factorised_encoder",
        "factorised_self_attention",
        "factorised_self_attention_time_space",
        "factorised_dot_product",
    ],
)
@pytest.mark.parametrize("tokenizer", ["none", "token_learner"])
def test_every_model_trains_on_it(composed, all_videos: Path, model: str, tokenizer: str) -> None:
    assert trained(composed, all_videos, f"backbone.model={model}", f"tokenizer={tokenizer}") > 0.5


@pytest.mark.slow
def test_only_one_of_two_processes_writes_the_videos(script, tmp_path: Path) -> None:
    few = [part for part in FEW if "measure" not in part and part != "trainer=cpu"]
    done = script("train.py", START, f"data.root={tmp_path / 'new'}", *few, "trainer=ddp_cpu", "measure=none")
    assert (done.stdout + done.stderr).count("Writing the videos") == 1
    (folder,) = (tmp_path / "new").iterdir()
    assert len(list(folder.glob("*/*/*.mp4"))) == 1797
