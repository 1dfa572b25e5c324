"""Unreadable pictures: in training replaced by one of their class, noted and limited; in evaluation an error."""

import csv
import io
import os
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning as L
import pytest
import torch
from PIL import Image

from fewtokens.data.image import folders
from fewtokens.data.image.folders import UnreadablePictureError
from fewtokens.data.image.imagenet import ImageNet
from fewtokens.errors import FewtokensError
from fewtokens.runs import skipped_videos
from fewtokens.runs.job import Job


def data(root: Path, **changes: Any) -> ImageNet:
    settings: dict[str, Any] = {"num_classes": 2, "image_size": 16, "batch_size": 4, "max_broken": 0.2} | changes
    found = ImageNet(root, **settings)
    found.setup("fit")
    return found


@pytest.fixture
def root(make_folders) -> Path:
    """Eight training pictures, of which b/0002.jpg is broken."""
    root = make_folders(parts=("train", "val"), classes=("a", "b"), count=4, size=(24, 24), suffix="jpg")
    bad = root / "train" / "b" / "0002.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_picture_is_replaced_by_one_of_its_class(root: Path, workers: int, caplog) -> None:
    found = data(root, num_workers=workers)
    seen = [[(x.clone(), y.clone()) for x, y in found.train_dataloader()] for _ in range(2)]
    assert torch.cat([targets for _, targets in seen[0]]).bincount().tolist() == [4, 4]
    for (a, b), (c, d) in zip(*seen, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)
    assert found.replaced == 2
    ((part, path, reason),) = found.skipped
    assert (part, path) == ("train", str(root / "train" / "b" / "0002.jpg"))
    assert reason
    assert sum("b/0002.jpg (train part) cannot be read and is replaced" in x.message for x in caplog.records) == 1


def test_too_many_end_training_and_evaluation_replaces_none(root: Path) -> None:
    found = data(root, max_broken=0.1)
    with pytest.raises(FewtokensError, match=r"1 of 8 training pictures .*max_broken=0.1 .*b/0002.jpg"):
        list(found.train_dataloader())
    with pytest.raises(FewtokensError, match=r"`data\.max_broken` must be a float in \[0, 1\]"):
        data(root, max_broken=1.5)
    for path in (root / "train").rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(FewtokensError, match="in a row cannot be read"):
        list(data(root, max_broken=1.0).train_dataloader())
    (root / "val" / "a" / "0001.jpg").write_bytes(b"no picture")
    found.setup("validate")
    with pytest.raises(FewtokensError, match=r"val/a/0001\.jpg: it is no picture"):
        list(found.val_dataloader())


def test_a_jpeg_of_too_many_pixels_and_a_pipe_are_refused_and_no_program_is_started(tmp_path: Path) -> None:
    path, content = tmp_path / "x.jpg", io.BytesIO()
    Image.new("L", (64, 64)).save(content, "JPEG")
    path.write_bytes(content.getvalue())
    assert folders.read_tensor(path).shape == (3, 64, 64)
    start = content.getvalue().index(b"\xff\xc0") + 5
    path.write_bytes(content.getvalue()[:start] + b"\x7f\xff\x7f\xff" + content.getvalue()[start + 4 :])
    with pytest.raises(UnreadablePictureError, match="decompression bomb"):
        folders.read_tensor(path)
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(UnreadablePictureError, match="it is no picture"):
        folders.read_tensor(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UnreadablePictureError, match="it is no file"):
        folders.read_bytes(path)


def test_what_was_replaced_is_reported_and_known_after_a_resume(root: Path, tmp_path: Path) -> None:
    found, other = data(root), data(root)
    list(found.train_dataloader())
    found.trainer = L.Trainer(logger=False, accelerator="cpu")
    other.load_state_dict(found.state_dict())
    assert (other.skipped, other.replaced) == (found.skipped, 1)
    job = Mock(spec=Job, data=other, trainer=found.trainer, directory=tmp_path)
    assert skipped_videos.summarize(job, {"test/top1": 0.5}) == {"data/train_skipped": 1.0, "data/train_replaced": 1.0}
    with (tmp_path / "skipped.csv").open() as file:
        assert [row["path"] for row in csv.DictReader(file)] == [str(root / "train" / "b" / "0002.jpg")]
