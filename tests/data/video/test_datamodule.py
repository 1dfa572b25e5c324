"""The video datamodule on small generated files. Every frame shows its number, so that a wrong clip is noticed."""

import json
from collections import Counter
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch

import videos
from fewtokens.callbacks.broken_videos import BrokenVideos
from fewtokens.data.skipped import Skipped
from fewtokens.data.transforms.geometric import RandomCrop
from fewtokens.data.video import manifest
from fewtokens.data.video.container import video_info
from fewtokens.data.video.datamodule import Videos
from fewtokens.data.video.records import Video
from fewtokens.errors import FewtokensError

FRAMES, LONG = 4, 40
PARTS = {"train": "train", "val": "val", "test": "val"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return videos.write_folders(tmp_path_factory.mktemp("videos"), LONG)


def data(root: Path, **changes) -> Videos:
    settings = {
        "root": str(root),
        "parts": PARTS,
        "num_classes": 2,
        "image_size": 48,
        "frames": FRAMES,
        "stride": 3,
        "decoder": "pyav",
        "batch_size": 4,
        "eval_batch_size": 3,
        "max_broken": 0.5,
    }
    return Videos(**(settings | changes))


def numbers(clip: torch.Tensor) -> list[int]:
    """Return the frame numbers that a clip (3, T, H, W), normalized to 0 to 1, shows."""
    return [videos.number((frame * 255).round().byte().numpy()) for frame in clip.transpose(0, 1)]


def batches(module: Videos, loader) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [module.on_after_batch_transfer(batch, 0) for batch in loader]


def test_models_get_clips_of_the_right_frames(root: Path) -> None:
    module = data(root)
    module.setup("fit")
    ((views, targets),) = batches(module, module.train_dataloader())
    assert views.shape == (4, 1, 3, FRAMES, 48, 48)
    assert views.is_contiguous() or views.transpose(2, 3).is_contiguous()
    assert sorted(targets.tolist()) == [0, 0, 1, 1]
    for clip in views[:, 0]:
        start = numbers(clip)[0]
        assert numbers(clip) == [start + 3 * step for step in range(FRAMES)]
        assert start + 3 * (FRAMES - 1) < LONG


def test_validation_uses_the_center_and_the_test_all_views_in_the_order_of_crops(root: Path) -> None:
    module = data(root, views=[2, 3], parts=PARTS | {"val": "train"})
    module.setup("fit")
    module.setup("test")
    views, _ = batches(module, module.val_dataloader())[0]
    assert views.shape == (3, 1, 3, FRAMES, 48, 48)
    assert numbers(views[0, 0])[0] == (LONG - 3 * FRAMES) // 2
    views, _ = batches(module, module.test_dataloader())[0]
    assert views.shape == (1, 6, 3, FRAMES, 48, 48)  # eval_batch_size counts views; the views of a video stay together
    assert [numbers(view)[0] for view in views[0]] == [0, LONG - 3 * FRAMES] * 3


def test_only_the_frames_of_a_section_are_used(root: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{root}/train/a/0.mp4 0 0.2 0.7\n")
    module = data(tmp_path, parts={"test": "list.txt"}, views=[2, 1], eval_batch_size=2)
    module.setup("test")
    ((views, _),) = batches(module, module.test_dataloader())
    assert [numbers(view) for view in views[0]] == [[6, 9, 12, 15], [9, 12, 15, 18]]  # frames 6 to 20


def test_a_broken_video_is_replaced_by_one_of_its_class_in_training(root: Path, caplog) -> None:
    module = data(root)
    module.setup("fit")
    seen = [batches(module, module.train_dataloader())[0] for _ in range(2)]
    assert Counter(seen[0][1].tolist()) == {0: 2, 1: 2}
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)  # the same replacement and the same clip
    assert module.replaced == 2
    ((part, path, reason),) = module.skipped
    assert (part, path) == ("train", "train/b/1.mp4")
    assert reason
    assert sum("train/b/1.mp4 (train part)" in record.message for record in caplog.records) == 1


def test_too_many_broken_videos_end_training_with_their_names(root: Path) -> None:
    module = data(root, max_broken=0.2)
    module.setup("fit")
    with pytest.raises(FewtokensError, match=r"1 of 4 .*max_broken=0.2 .*train/b/1.mp4"):
        list(module.train_dataloader())


def test_the_broken_videos_of_all_processes_count_together(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = data(root, max_broken=0.3)  # one of the four videos
    module.setup("fit")
    list(module.train_dataloader())
    trainer, task = L.Trainer(logger=False, accelerator="cpu"), L.LightningModule()
    trainer.datamodule = module
    monkeypatch.setattr(L.Trainer, "world_size", 2)
    elsewhere = list(module.broken)

    def gather(found: list, mine: object) -> None:
        found[:] = [mine, elsewhere]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    BrokenVideos().on_train_epoch_end(trainer, task)  # both have found the same one
    elsewhere += [Skipped("train", "train/a/0.mp4", "it is empty")]
    with pytest.raises(FewtokensError, match=r"2 of 4 training videos"):
        BrokenVideos().on_train_epoch_end(trainer, task)


def test_what_was_broken_is_still_known_after_resuming(root: Path) -> None:
    module, other = data(root), data(root)
    module.setup("fit")
    list(module.train_dataloader())
    module.trainer = L.Trainer(logger=False, accelerator="cpu")
    other.load_state_dict(module.state_dict())
    assert (other.skipped, other.replaced) == (module.skipped, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_skips_and_names_what_it_cannot_read(root: Path, workers: int) -> None:
    module = data(root, num_workers=workers, eval_batch_size=1)  # so that one batch is empty
    module.setup("test")
    found = batches(module, module.test_dataloader())
    assert [targets.tolist() for _, targets in found] == [[0], [1]]
    assert module.tested == 2
    assert [record[:2] for record in module.skipped] == [("test", "val/b/0.mp4")]


class Seen(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.targets: list[int] = []
        self.layer = torch.nn.Linear(1, 1)

    def test_step(self, batch, index: int) -> None:
        self.targets += batch[1].tolist()


def test_lightning_goes_on_after_an_empty_batch(root: Path) -> None:
    module, seen = data(root, eval_batch_size=1), Seen()
    L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False).test(
        seen, module, verbose=False
    )
    assert seen.targets == [0, 1]


def test_measures_see_one_view_and_count_nothing(root: Path) -> None:
    module = data(root, views=[2, 3])
    module.setup("fit")
    views, _ = batches(module, module.measured_dataloader())[0]
    assert views.shape[1] == 1
    assert (module.tested, module.untested, module.skipped) == (0, 0, [])
    with pytest.raises(FewtokensError, match="no test samples in"):
        data(root, parts={"train": "train"}).measured_dataloader()


def test_one_frame_has_no_axis_of_time(root: Path) -> None:
    module = data(root, frames=1)
    module.setup("test")
    views, _ = batches(module, module.test_dataloader())[0]
    assert views.shape[1:] == (1, 3, 48, 48)


def test_several_labels_become_a_row_of_ones(root: Path, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(f"path,label\n{root}/val/a/0.mp4,2;0\n{root}/val/b/1.mp4,\n")
    module = data(tmp_path, parts={"test": "list.csv"}, multilabel=True, num_classes=4)
    module.setup("test")
    ((_, targets),) = batches(module, module.test_dataloader())
    assert targets.tolist() == [[1, 0, 1, 0], [0, 0, 0, 0]]


def test_videos_that_a_manifest_skips_are_reported_and_changed_files_noticed(root: Path, tmp_path: Path) -> None:
    path = root / "val/a/0.mp4"
    info, size = video_info(str(path)), path.stat().st_size
    rows = [manifest.ManifestRow(Video(str(path), (0,)), info, 0, info.frames, size, "", None)]
    rows += [manifest.ManifestRow(Video(str(path), (1,)), info, 0, info.frames, size + 1, "", None)]
    rows += [manifest.ManifestRow(Video("x.mp4", (1,)), None, 0, 0, 0, "", "the file is empty")]
    manifest.write(tmp_path / "val.csv", rows)
    module = data(tmp_path, parts={"test": "val.csv"})
    module.setup("test")
    assert module.skipped == [Skipped("test", "x.mp4", "skipped by the manifest: the file is empty")]
    ((_, targets),) = batches(module, module.test_dataloader())
    assert targets.tolist() == [0]
    assert f"it had {size + 1} bytes" in module.skipped[1].reason


def test_clips_depend_on_seed_and_epoch_and_not_on_workers(root: Path) -> None:
    def clips(epoch: int, **changes) -> list[list[int]]:
        module = data(root, **changes)
        module.setup("fit")
        loader = module.train_dataloader()
        loader.sampler.set_epoch(epoch)
        views, _ = module.on_after_batch_transfer(next(iter(loader)), 0)
        return [numbers(clip) for clip in views[:, 0]]

    first = clips(0)
    assert clips(0, num_workers=2) == first
    assert clips(1) != first
    assert clips(0, seed=1) != first


def test_clips_are_the_same_with_and_without_a_manifest(root: Path, tmp_path: Path) -> None:
    names = ["train/a/0.mp4", "train/a/1.mp4", "train/b/0.mp4"]
    rows = []
    for name in names:
        info = video_info(str(root / name))
        size = (root / name).stat().st_size
        rows.append(manifest.ManifestRow(Video(name, (0,)), info, 0, info.frames, size, "", None))
    manifest.write(tmp_path / "train.csv", rows)
    (tmp_path / "list.txt").write_text("".join(f"{name} 0\n" for name in names))
    found = []
    for source in ("train.csv", "list.txt"):
        module = data(root, parts={"train": str(tmp_path / source)}, num_classes=1)
        module.setup("fit")
        found += batches(module, module.train_dataloader())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def write_manifest(file: Path, root: Path, labels: dict[str, int], classes: list[str] | None) -> None:
    """Write a manifest of some videos with its summary, as `prepare` does."""
    rows = []
    for name, label in labels.items():
        info, size = video_info(str(root / name)), (root / name).stat().st_size
        rows.append(manifest.ManifestRow(Video(str(root / name), (label,)), info, 0, info.frames, size, "", None))
    manifest.write(file, rows)
    if classes is not None:
        manifest.summary_file(file).write_text(json.dumps({"classes": classes}))


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (["b"], r"val\.csv of the test part numbers 1 classes differently from the 2 .*: it lacks a\. .*--classes"),
        (["b", "c"], "it lacks a and has c, which the others lack"),
        (["b", "a"], "it has another order"),
        (["a", "b"], None),
        ([], None),
        (None, None),
    ],
)
@pytest.mark.parametrize("train", ["train.csv", "folder"])
def test_manifests_with_other_class_names_are_refused(root: Path, tmp_path, train: str, classes, said) -> None:
    write_manifest(tmp_path / "train.csv", root, {"train/a/0.mp4": 0, "train/b/0.mp4": 1}, ["a", "b"])
    write_manifest(tmp_path / "val.csv", root, {"val/b/1.mp4": 0}, classes)
    parts = {"train": str(root / "train") if train == "folder" else "train.csv", "test": "val.csv"}
    module = data(tmp_path, parts=parts)
    if said is None:
        module.setup("test")
        return
    with pytest.raises(FewtokensError, match=said):
        module.setup("test")
    with pytest.raises(FewtokensError, match=said):
        data(tmp_path, parts=parts).setup("fit")  # training ends before hours of it, not at the test


def test_a_list_without_all_classes_is_numbered_as_the_training_part(root: Path, tmp_path: Path) -> None:
    write_manifest(tmp_path / "train.csv", root, {"train/a/0.mp4": 0, "train/b/0.mp4": 1}, ["a", "b"])
    (tmp_path / "val" / "b").mkdir(parents=True)
    (tmp_path / "val" / "b" / "0.mp4").symlink_to(root / "val" / "b" / "1.mp4")
    for train in (str(root / "train"), "train.csv"):
        module = data(tmp_path, parts={"train": train, "val": "val", "test": "val"})
        module.setup("test")
        ((_, targets),) = batches(module, module.test_dataloader())
        assert targets.tolist() == [1]


def test_frames_that_are_too_small_are_named_with_their_file(root: Path) -> None:
    module = data(root, image_size=200)
    module.setup("fit")
    with pytest.raises(FewtokensError, match=r"train/[ab]/\d.mp4.*data.resize=200"):
        list(module.train_dataloader())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parts": {"train": "nowhere"}}, "nowhere"),
        ({"parts": {"trian": "train"}}, "trian"),
        ({"num_classes": 3}, "data.num_classes=2"),
        ({"decoder": "ffmpeg"}, "data.decoder"),
        ({"views": [4]}, "views"),
        ({"views": [4, 2]}, "views"),
        ({"stride": 0}, "stride"),
        ({"max_broken": 1.5}, "max_broken"),
        ({"channels": 1}, "channels"),
        ({"scale_jitter": [0.5, 1.0]}, "scale_jitter"),
        ({"resize": 20}, "resize"),
        ({"train_transforms": [RandomCrop(40)]}, "image_size"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_decoded(root: Path, changes: dict, words: str) -> None:
    with pytest.raises(FewtokensError, match=words):
        data(root, **changes).setup("fit")


def test_frames_lie_in_memory_with_the_channels_last(root: Path) -> None:
    module = data(root)
    module.setup("test")
    views, _ = next(iter(module.test_dataloader()))
    assert views.shape[3] == 3
    assert views.permute(0, 1, 2, 4, 5, 3).is_contiguous()
    assert np.isin(views.numpy(), range(256)).all()


def test_the_root_may_be_relative_to_the_working_directory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.parent)
    module = data(Path(root.name))
    module.setup("fit")
    module.setup("test")
    assert len(batches(module, module.train_dataloader())) == len(batches(module, module.test_dataloader())) == 1
