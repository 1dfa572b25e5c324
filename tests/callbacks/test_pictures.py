"""Pictures during training: in every logger that accepts them, of the same images, and without effect on the run."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from conftest import TINY
from fewtokens.analysis.pictures.drawing import CELL
from fewtokens.analysis.pictures.sheet import GAP, LEGEND_WIDTH, MARGIN, SIDE, line_height, text_width
from fewtokens.analysis.pictures.token_maps import token_picture
from fewtokens.callbacks import pictures as module
from fewtokens.callbacks.loggers import WandbRun
from fewtokens.callbacks.pictures import Pictures, log_picture, log_video
from fewtokens.errors import FewtokensError
from fewtokens.runs import train as training
from fewtokens.tasks.classification import Classifier
from fewtokens.tokenizers.token_learner import TokenLearnerV11
from vivits import Data, build

# All kinds of randomness, and a schedule that does not depend on the length of the run.
PLAIN = [*TINY, "schedule=constant", "backbone.options.proj_drop_rate=0.1",
       "backbone.options.drop_path_rate=0.1", "task.mix.mixup=0.8", "test=false"]  # fmt: skip
RUN = [*PLAIN, "tokenizer.build.num_tokens=2"]
DRAWN = ["callbacks=pictures", "callbacks.pictures.every_n_epochs=1", "callbacks.pictures.num_images=3"]


def weights(run: Path) -> dict[str, torch.Tensor]:
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return {name: value for name, value in content["state_dict"].items() if name.startswith("model.")}


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "pictures").iterdir())


def images_in_tensorboard(run: Path) -> dict[str, list[int]]:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    return {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}


def test_drawing_changes_nothing_and_a_resumed_run_draws_the_same(composed, tmp_path: Path) -> None:
    training.run(composed(*RUN, "trainer.max_epochs=3", directory="plain"))
    training.run(composed(*RUN, *DRAWN, "logger=tensorboard", "trainer.max_epochs=3", directory="drawn"))
    training.run(composed(*RUN, *DRAWN, "logger=tensorboard", "trainer.max_epochs=2", directory="cut"))
    cut = tmp_path / "cut"
    assert names(cut) == ["epoch_1.png", "epoch_2.png"]
    training.run(composed(f"resume={cut}", "trainer.max_epochs=3", directory="cut"))
    assert names(cut) == names(tmp_path / "drawn") == ["epoch_1.png", "epoch_2.png", "epoch_3.png"]
    for name in names(cut):
        assert (cut / "pictures" / name).read_bytes() == (tmp_path / "drawn" / "pictures" / name).read_bytes()
    plain = weights(tmp_path / "plain")
    for run in ("drawn", "cut"):
        assert all(torch.equal(value, plain[name]) for name, value in weights(tmp_path / run).items())
        assert images_in_tensorboard(tmp_path / run) == {"val/token_maps": [3, 6, 9]}
    first, last = (np.asarray(Image.open(cut / "pictures" / f"epoch_{n}.png")) for n in (1, 3))
    left, top = MARGIN + round(text_width("prediction: 0 ✗", 13)) + SIDE, MARGIN + 2 * line_height(13)
    same = [picture[top : top + CELL, left : left + CELL] for picture in (first, last)]
    assert np.array_equal(*same), "the same images"
    assert not np.array_equal(first, last)


def test_offline_wandb_keeps_pictures_of_validation_and_of_the_test(
    composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    measured = [
        "measure=default",
        "~measure.throughput",
        "~measure.confusion",
        "measure.cost.num_images=8",
        "test=true",
    ]
    training.run(composed(*RUN, *DRAWN, *measured, "logger=wandb", "trainer.max_epochs=2"))
    (run,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    kept = sorted((run / "files" / "media" / "images").rglob("*.png"))
    assert [path.parent.name + "/" + path.name.partition("_maps")[0] for path in kept] == [
        "test/token",
        "val/token",
        "val/token",
    ]
    on_disk = {Image.open(path).tobytes() for path in (tmp_path / "run" / "pictures").glob("epoch_*.png")}
    assert {Image.open(path).convert("RGB").tobytes() for path in kept if path.parent.name == "val"} == on_disk


def test_every_n_epochs_and_only_as_many_images_as_there_are(composed, tmp_path: Path) -> None:
    options = ["callbacks.pictures.every_n_epochs=2", "callbacks.pictures.num_images=70", "trainer.max_epochs=3"]
    training.run(composed(*RUN, *DRAWN, *options, "trainer.limit_val_batches=1"))
    assert names(tmp_path / "run") == ["epoch_2.png"]
    height, width = np.asarray(Image.open(tmp_path / "run" / "pictures" / "epoch_2.png")).shape[:2]
    assert 0 < height - 64 * (CELL + GAP) < 2 * CELL, "64 rows of a batch"
    assert width == LEGEND_WIDTH > 3 * CELL, "the image and two tokens"


def test_a_dense_model_draws_nothing(composed, tmp_path: Path) -> None:
    training.run(composed(*PLAIN, *DRAWN, "tokenizer=none", "tokenizer.at=[]"))
    assert not (tmp_path / "run" / "pictures").exists()


def test_an_average_of_the_weights_is_what_is_drawn(composed, tmp_path: Path, monkeypatch) -> None:
    seen = []

    def spy(model, images, *limits):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return token_picture(model, images, *limits)

    monkeypatch.setattr(module, "token_picture", spy)
    options = ["callbacks=[pictures,ema]", *DRAWN[1:], "callbacks.ema.decay=0.5", "optimizer.lr=0.1"]
    training.run(composed(*RUN, *options))
    content = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    averaged, current = content["state_dict"], content["current_model_state"]
    head = "vit.head.weight"
    assert torch.equal(seen[0][head], averaged[f"model.{head}"])
    assert not torch.equal(seen[0][head], current[f"model.{head}"])


class Clips(Data):
    """As `Data`, for validation."""

    def val_dataloader(self):
        return DataLoader(self.test_dataloader(), batch_size=None)


def test_clips_are_drawn_over_time_and_kept_by_offline_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    model = build(tokenizer=partial(TokenLearnerV11, num_tokens=4), at=[1])
    task = Classifier(model, num_classes=5, optimizer=torch.optim.SGD)
    loggers = [WandbRun(str(tmp_path)), TensorBoardLogger(str(tmp_path), name="tensorboard", version="")]
    drawer = Pictures(str(tmp_path / "pictures"), num_images=4)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(callbacks=[drawer], logger=loggers, enable_checkpointing=False, **quiet)
    trainer.validate(task, Clips(), verbose=False)
    wandb.finish()
    assert names(tmp_path) == ["epoch_1.gif", "epoch_1.png"]
    height = Image.open(tmp_path / "pictures" / "epoch_1.png").height
    assert 5 * 91 < height < 6 * 91 + 60, "the three steps of one clip: its frame and four tokens below, and a legend"
    assert Image.open(tmp_path / "pictures" / "epoch_1.gif").n_frames == 3
    (video,) = tmp_path.glob("wandb/offline-run-*/files/media/videos/val/*.gif")
    assert video.read_bytes() == (tmp_path / "pictures" / "epoch_1.gif").read_bytes()
    assert images_in_tensorboard(tmp_path) == {"val/token_maps": [0]}


def test_loggers_that_take_no_pictures_are_left_alone() -> None:
    class NumbersOnly(Logger):
        name = version = ""

        def log_metrics(self, metrics, step=None):
            raise AssertionError

        def log_hyperparams(self, params, *args, **kwargs):
            raise AssertionError

    log_picture(NumbersOnly(), "val/token_maps", np.zeros((2, 3, 3), dtype=np.uint8), 0)
    log_video(NumbersOnly(), "val/token_maps_video", Path("no such file"), 0)


@pytest.mark.parametrize("wrong", [{"every_n_epochs": 0}, {"num_images": 0}, {"max_columns": -1}])
def test_wrong_numbers_are_answered_with_a_sentence(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(FewtokensError, match=rf"`callbacks\.pictures\.{next(iter(wrong))}` must be an int >= 1"):
        Pictures(str(tmp_path), **wrong)
