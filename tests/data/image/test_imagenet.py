"""ImageNet: class indices, timm's preprocessing in evaluation, draws independent of workers, and unreadable files."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from fewtokens.data.image import folders
from fewtokens.data.image.imagenet import ImageNet, preprocessing
from fewtokens.errors import FewtokensError

WNIDS = ("n01440764", "n01443537", "n15075141")  # ILSVRC classes 0, 1, 999


def data(root: Path, **changes: Any) -> ImageNet:
    settings = {"num_classes": 3, "image_size": 64, "batch_size": 4} | changes
    return ImageNet(root, **settings)


@pytest.fixture
def root(make_folders) -> Path:
    return make_folders(parts=("train", "val"), classes=WNIDS, count=3, size=(120, 88), suffix="JPEG")


def test_folders_of_some_classes_get_their_true_indices(root: Path) -> None:
    found = data(root, num_classes=1000)
    found.setup()
    assert found.dataset("val").targets.tolist() == [0] * 3 + [1] * 3 + [999] * 3
    found = data(root)
    found.setup()
    assert found.dataset("train").targets.tolist() == [0] * 3 + [1] * 3 + [2] * 3


def test_the_folders_of_train_number_the_classes_of_both_parts(make_folders) -> None:
    root = make_folders(parts=("train", "val"), classes=WNIDS, count=1, size=(80, 80), suffix="JPEG")
    shutil.rmtree(root / "val" / WNIDS[0])
    found = data(root)
    found.setup("test")
    assert found.dataset("test").targets.tolist() == [1, 2]
    (root / "val" / WNIDS[1]).rename(root / "val" / "n00000001")
    with pytest.raises(FewtokensError, match=r"must be those of .*/train, which has no n00000001"):
        data(root).setup("test")


@pytest.mark.parametrize("preset", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "vit_base_patch16_clip_224"])
def test_evaluation_equals_timms(root: Path, preset: str) -> None:
    found = data(root, preset=preset)
    found.setup("validate")
    images, targets = next(iter(found.val_dataloader()))
    assert images.dtype == torch.uint8
    views, _ = found.on_after_batch_transfer((images, targets), 0)
    known = timm.models.get_pretrained_cfg(preset)
    assert known is not None
    config = timm.data.resolve_data_config({"input_size": (3, 64, 64)}, pretrained_cfg=known.to_dict())
    transform = timm.data.create_transform(**config)
    expected = torch.stack([transform(folders.read_pil(found.dataset("val").files.path(i))) for i in range(4)])
    torch.testing.assert_close(views[:, 0], expected, atol=1e-5, rtol=0)


def test_torchvision_backend_is_close(root: Path) -> None:
    found = []
    for backend in ("pil", "torchvision"):
        one = data(root, image_backend=backend)
        one.setup("test")
        found.append(next(iter(one.test_dataloader()))[0].int())
    difference = (found[0] - found[1]).abs()
    assert difference.max() <= 2


def test_explicit_values_replace_the_presets_and_unknown_names_are_ignored(tmp_path: Path) -> None:
    preset = "vit_tiny_patch16_224"
    assert preprocessing(preset)["mean"] == (0.5, 0.5, 0.5)
    assert preprocessing(preset)["crop_pct"] == 0.9
    assert preprocessing(preset, crop_pct=1.0)["crop_pct"] == 1.0
    assert preprocessing(preset, interpolation="bilinear")["interpolation"] == "bilinear"
    assert data(tmp_path, preset=preset).mean == [0.5] * 3
    assert data(tmp_path, preset=preset, mean=[0.1] * 3).mean == [0.1] * 3
    assert data(tmp_path, preset=preset, mean=[0.1] * 3).std == [0.5] * 3
    usual = preprocessing(None)
    assert usual["crop_pct"] == 0.875
    assert preprocessing("vit_mini") == preprocessing("vit_tiny_patch16_224.no_such_tag") == usual


def test_draws_depend_on_seed_epoch_and_index_but_not_on_workers(root: Path) -> None:
    def epoch(number: int, **changes: Any) -> list[torch.Tensor]:
        found = data(root, **changes)
        found.setup("fit")
        loader = found.train_dataloader()
        loader.sampler.set_epoch(number)
        order = [stamp % 9 for stamp in loader.sampler]
        images = torch.cat([images for images, _ in loader])
        return list(images[torch.tensor(order).argsort()])

    before = torch.get_rng_state()
    first = epoch(0)
    assert torch.equal(torch.get_rng_state(), before)
    for same in (epoch(0, num_workers=2), epoch(0, batch_size=2)):
        assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    for other in (epoch(1), epoch(0, seed=1)):
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_val_alone_is_enough_to_evaluate(make_folders) -> None:
    root = make_folders(parts=("val",), classes=WNIDS, count=1, suffix="JPEG")
    data(root).setup("test")
    data(root).setup()
    with pytest.raises(FewtokensError, match=r"train/n01440764/\*.JPEG"):
        data(root).setup("fit")
    with pytest.raises(FewtokensError, match=r"ILSVRC2012_img_val\.tar"):
        data(root / "absent").setup("test")


def test_cmyk_and_png_named_jpeg_are_read(tmp_path: Path) -> None:
    pixels = np.full((16, 16, 3), (200, 100, 50), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.JPEG", format="PNG")
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "b.JPEG")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "c.JPEG")
    for name in "abc":
        tensor = folders.read_tensor(tmp_path / f"{name}.JPEG")
        assert tensor.shape == (3, 16, 16)
        expected = torch.from_numpy(np.array(folders.read_pil(tmp_path / f"{name}.JPEG"))).permute(2, 0, 1)
        assert (tensor.int() - expected.int()).abs().max() < 6
    assert folders.read_tensor(tmp_path / "a.JPEG")[:, 0, 0].tolist() == [200, 100, 50]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", [b"", b"no picture", None])
def test_a_bad_file_is_named_also_from_a_worker(root: Path, workers: int, damage: bytes | None) -> None:
    bad = root / "val" / WNIDS[1] / "0001.JPEG"
    bad.write_bytes(bad.read_bytes()[:400] if damage is None else damage)
    found = data(root, num_workers=workers)
    found.setup("test")
    with pytest.raises(FewtokensError, match=f"{WNIDS[1]}/0001.JPEG"):
        list(found.test_dataloader())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_classes": 4}, r"`data\.num_classes` must be the number .*got 4 with 3 folders"),
        ({"image_backend": "opencv"}, r"`data\.image_backend` must be 'pil' or 'torchvision'"),
        ({"interpolation": "lanczos"}, r"`data\.interpolation` must be 'bilinear' or 'bicubic' or None"),
        ({"crop_pct": 1.5}, r"`data\.crop_pct` must be a float in \(0, 1\] or null"),
        ({"min_scale": 0.0}, r"`data\.min_scale` must be a float in \(0, 1\]"),
        ({"flip": 1.5}, r"`data\.flip` must be a float in \[0, 1\]"),
        ({"batch_size": -1}, r"`data\.batch_size` must be an int >= 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(root: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(FewtokensError, match=match):
        data(root, **changes).setup("test")


def test_folders_that_are_no_classes_of_ilsvrc_are_named(make_folders) -> None:
    with pytest.raises(FewtokensError, match="cat is no class of ILSVRC"):
        data(make_folders(parts=("val",), classes=("cat", "dog")), num_classes=1000).setup("test")


@pytest.mark.skipif("FEWTOKENS_IMAGENET" not in os.environ, reason="FEWTOKENS_IMAGENET names no folder with ImageNet")
def test_real_imagenet_is_decoded() -> None:
    found = data(Path(os.environ["FEWTOKENS_IMAGENET"]), num_classes=1000, image_size=224, num_workers=2)
    found.setup("test")
    images, targets = next(iter(found.test_dataloader()))
    assert images.shape == (4, 3, 224, 224)
    assert targets.max() < 1000
