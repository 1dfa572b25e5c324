"""Batched transforms: independent draws, determinism, edge values, and parity with the libraries they follow."""

import colorsys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from fewtokens.data.seeding import generator, mix
from fewtokens.data.transforms import geometric as transforms
from fewtokens.data.transforms import randaugment
from fewtokens.data.transforms.color import ColorJitter
from fewtokens.data.transforms.erasing import RandomErasing
from fewtokens.data.transforms.normalize import Pipeline
from fewtokens.errors import FewtokensError


def images(b: int = 16, c: int = 3, side: int = 32) -> Tensor:
    return torch.randint(256, (b, c, side, side), dtype=torch.uint8, generator=generator(7))


ALL: list[Any] = [
    transforms.PadCrop(4),
    transforms.PadCrop(4, mode="reflect"),
    transforms.RandomCrop(24),
    transforms.RandomCrop(24, per_batch=True),
    transforms.RandomFlip(),
    transforms.Resize(40),
    transforms.CenterCrop(20),
    randaugment.RandAugment(2, 9),
]


@pytest.mark.parametrize("transform", ALL, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("channels", [1, 3])
def test_same_generator_same_images_and_the_input_stays(transform: object, channels: int) -> None:
    batch = images(c=channels)
    before = batch.clone()
    first, second = (transform(batch, generator(1, 2)) for _ in range(2))  # type: ignore[operator]
    assert torch.equal(first, second)
    assert torch.equal(batch, before)
    assert first.dtype == (torch.float32 if isinstance(transform, transforms.Resize) else torch.uint8)


@pytest.mark.parametrize(
    "transform",
    [*ALL, ColorJitter(), RandomErasing(0.9, fill="noise"), RandomErasing(0.9)],
    ids=lambda t: type(t).__name__,
)
@pytest.mark.parametrize("frames", [1, 3])
def test_all_frames_of_a_clip_are_treated_as_one_image_is(transform: Any, frames: int) -> None:
    batch = images()
    if isinstance(transform, RandomErasing):
        batch = batch.float()
    alone = transform(batch, generator(1, 2))
    clips = batch[:, None].repeat(1, frames, 1, 1, 1)
    for layout in (clips, clips.transpose(1, 2).contiguous().transpose(1, 2)):  # as videos come: channels before time
        before = layout.clone()
        out = transform(layout, generator(1, 2))
        assert torch.equal(out, alone[:, None].expand_as(out))
        assert out.shape[1] == frames
        assert torch.equal(layout, before)


def test_pipeline_takes_clips() -> None:
    steps = [transforms.RandomFlip(), ColorJitter(), randaugment.RandAugment(2, 9), transforms.Resize(16)]
    pipeline = Pipeline(steps, [0.5] * 3, [0.5] * 3)
    clips = images()[:, None].expand(-1, 4, -1, -1, -1)
    out = pipeline(clips, generator(0))
    assert out.shape == (16, 4, 3, 16, 16)
    assert torch.equal(out, out[:, :1].expand_as(out))
    assert out.is_contiguous()


def jittered(clip: Tensor, shift: float, contrast: float, saturation: float, hue: float, gray: bool) -> Tensor:
    """One clip (T, 3, H, W) step by step, pixel by pixel, with the standard library's YIQ."""
    pixels = (clip.double().permute(0, 2, 3, 1).reshape(-1, 3) + 255 * shift).tolist()
    changed = []
    for red, green, blue in pixels:
        luma = 0.299 * red + 0.587 * green + 0.114 * blue
        y, i, q = colorsys.rgb_to_yiq(*(luma + saturation * (x - luma) for x in (red, green, blue)))
        turned = complex(i, q) * np.exp(2j * np.pi * hue)
        # colorsys.yiq_to_rgb clips its result and rounds its matrix, so the equations are solved instead.
        matrix = np.array([colorsys.rgb_to_yiq(*unit) for unit in np.eye(3)]).T
        changed.append(np.linalg.solve(matrix, [y, turned.real, turned.imag]))
    array = np.array(changed)
    array = array.mean(0) + contrast * (array - array.mean(0))
    if gray:
        array = np.repeat(array @ np.array([0.299, 0.587, 0.114])[:, None], 3, 1)
    t, _, h, w = clip.shape
    return torch.from_numpy(array.round().clip(0, 255)).view(t, h, w, 3).permute(0, 3, 1, 2)


def test_color_jitter_equals_its_steps_one_by_one() -> None:
    clips = torch.randint(256, (8, 2, 3, 5, 4), dtype=torch.uint8, generator=generator(3))
    out = ColorJitter(0.1, 0.4, 0.3, 0.2, p=0.7, gray=0.4)(clips, generator(11))
    rand = torch.rand(6, 8, generator=generator(11)).double()
    changed = rand[4] < 0.7
    assert 0 < changed.sum() < 8
    for index, clip in enumerate(clips):
        shift, contrast, saturation, hue = (
            float((2 * rand[i, index] - 1) * s * changed[index]) for i, s in enumerate((0.1, 0.4, 0.3, 0.2))
        )
        gray = bool(rand[5, index] < 0.4)
        expected = jittered(clip, shift, 1 + contrast, 1 + saturation, hue, gray)
        assert (out[index] - expected).abs().max() <= 3  # the library rounds its matrix to two digits
        if not changed[index] and not gray:
            assert torch.equal(out[index], clip)


def test_color_jitter_draws_per_clip_and_can_do_nothing() -> None:
    batch = images(1).expand(64, -1, -1, -1)
    assert len(ColorJitter(p=1.0)(batch, generator(0)).flatten(1).unique(dim=0)) == 64
    assert torch.equal(ColorJitter(p=0.0, gray=0.0)(batch, generator(0)), batch)
    gray = ColorJitter(p=0.0, gray=1.0)(batch, generator(0))
    assert torch.equal(gray, gray[:, :1].expand_as(gray))


def test_crops_equal_slices() -> None:
    batch = images(8)[:, :, :, 1:]  # not contiguous, with an offset
    top, left = torch.arange(8), torch.arange(8).flip(0)
    expected = torch.stack([batch[i, :, i : i + 20, 7 - i : 27 - i] for i in range(8)])
    assert torch.equal(transforms.crop(batch, top, left, 20), expected)


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_pad_crop_shifts_every_image_by_its_own_draw(mode: str) -> None:
    batch = images(1).expand(64, -1, -1, -1)
    out = transforms.PadCrop(4, mode=mode)(batch, generator(0))  # type: ignore[arg-type]
    padded = torch.nn.functional.pad(batch[:1].float(), (4,) * 4, mode=mode).to(torch.uint8)
    windows = padded.unfold(2, 32, 1).unfold(3, 32, 1)[0].permute(1, 2, 0, 3, 4).flatten(0, 1)
    places = (out[:, None] == windows[None]).flatten(2).all(-1)
    assert places.sum(1).eq(1).all()
    assert len(places.int().argmax(1).unique()) > 30


def test_nothing_happens_at_the_edge_values() -> None:
    batch, draws = images(), generator(0)
    for transform in (
        transforms.PadCrop(0),
        transforms.RandomCrop(32),
        transforms.CenterCrop(32),
        transforms.RandomFlip(0.0),
        randaugment.RandAugment(0),
    ):
        assert torch.equal(transform(batch, draws), batch)
    assert torch.equal(transforms.RandomFlip(1.0)(batch, draws), batch.flip(-1))
    assert torch.equal(transforms.Resize(32)(batch, draws), batch.float())
    assert torch.equal(RandomErasing(0.0)(batch.float(), draws), batch.float())


def test_flips_are_drawn_per_image() -> None:
    batch = images(200)
    out = transforms.RandomFlip()(batch, generator(3))
    flipped = (out == batch.flip(-1)).flatten(1).all(1)
    kept = (out == batch).flatten(1).all(1)
    assert (flipped ^ kept).all()
    assert 60 < flipped.sum() < 140


def test_per_batch_crop_takes_one_place() -> None:
    batch = images(1).expand(32, -1, -1, -1)
    one = transforms.RandomCrop(20, per_batch=True)(batch, generator(1))
    each = transforms.RandomCrop(20)(batch, generator(1))
    assert (one == one[:1]).all()
    assert not (each == each[:1]).all()


def test_resize_has_half_pixel_centers_and_no_antialiasing() -> None:
    ramp = torch.arange(4.0).repeat(1, 1, 4, 1)
    out = transforms.Resize(8)(ramp, generator(0))  # tf.image.resize of 0 1 2 3 to 8
    assert out[0, 0, 0].tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    assert transforms.Resize(2)(ramp, generator(0))[0, 0, 0].tolist() == [0.5, 2.5]


def test_keras_pipeline_is_a_list_of_transforms() -> None:
    train = [transforms.Resize(52), transforms.RandomCrop(48, per_batch=True), transforms.RandomFlip()]
    out = Pipeline(train, [0.0] * 3, [1.0] * 3)(images(), generator(0))
    assert out.shape == (16, 3, 48, 48)
    assert 0 <= out.min() < 0.1
    assert 0.9 < out.max() <= 1


def test_pipeline_normalizes_like_torchvision_and_back() -> None:
    mean, std = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]
    pipeline = Pipeline([], mean, std)
    batch = images()
    out = pipeline(batch, generator(0))
    torch.testing.assert_close(out, v2.functional.normalize(batch / 255, mean, std), atol=1e-5, rtol=0)
    assert torch.equal(pipeline.undo(out), batch)


def test_pipeline_leaves_a_float_batch_alone() -> None:
    batch = images().float()
    before = batch.clone()
    Pipeline([], [0.5], [0.5])(batch, generator(0))
    assert torch.equal(batch, before)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", list(randaugment._OPERATIONS))
@pytest.mark.parametrize("magnitude", [0, 9, 30])
@pytest.mark.parametrize("sign", [0, 1])
def test_randaugment_equals_torchvision_image_by_image(name: str, channels: int, magnitude: int, sign: int) -> None:
    reference = v2.RandAugment()
    batch = images(4, channels)
    number = list(randaugment._OPERATIONS).index(name)
    found = randaugment.RandAugment(1, magnitude)._apply(batch, torch.full((4,), 2 * number + sign))
    table, signed = reference._AUGMENTATION_SPACE[name]
    values = table(31, 32, 32)
    strength = 0.0 if values is None else float(values[magnitude]) * (-1 if signed and sign else 1)
    for image, mine in zip(batch, found, strict=True):
        expected = reference._apply_image_or_video_transform(
            image, name, strength, interpolation=InterpolationMode.NEAREST, fill={type(image): None, "others": None}
        )
        assert torch.equal(mine, expected)


def test_randaugment_draws_per_image() -> None:
    batch = images(1).expand(128, -1, -1, -1)
    assert len(randaugment.RandAugment(1, 15)(batch, generator(0)).flatten(1).unique(dim=0)) >= 20


@pytest.mark.parametrize("fill", ["zero", "noise"])
def test_random_erasing_follows_timms_distribution(fill: str) -> None:
    batch = torch.full((2000, 1, 32, 32), 9.0)
    out = RandomErasing(0.25, fill=fill)(batch, generator(5))
    erased = (out != 9.0)[:, 0]
    hit = erased.flatten(1).any(1)
    assert 0.2 < hit.float().mean() < 0.3
    share = erased.float().mean((1, 2))[hit]
    assert share.min() > 0.01
    assert share.max() < 0.36
    assert 0.15 < share.mean() < 0.2  # uniform between 0.02 and 1/3; some tall and large ones do not fit
    boxes = erased[hit]
    height, width = boxes.any(2).sum(1), boxes.any(1).sum(1)
    assert torch.equal(height * width, boxes.sum((1, 2)))  # rectangles
    assert (height / width).log().abs().max() < 1.6
    assert abs(float((height / width).log().mean())) < 0.15


def test_erasing_comes_after_normalizing() -> None:
    out = Pipeline([RandomErasing(1.0), transforms.RandomFlip()], [0.5], [0.1])(images(4), generator(0))
    assert (out == 0).flatten(1).any(1).all()


def test_seeds_depend_on_every_number_and_their_order() -> None:
    seeds = {mix(a, b, c) for a in range(6) for b in range(6) for c in range(6)}
    assert len(seeds) == 216
    assert mix(1, 2, 3) == 6498626229777268288  # the same on every machine and in every release


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: transforms.PadCrop(-1), r"`PadCrop\.padding` must be an int >= 0"),
        (lambda: transforms.PadCrop(1, mode="wrap"), r"`PadCrop\.mode` must be 'constant' or 'reflect'"),
        (lambda: transforms.Resize(8, "lanczos"), r"`Resize\.interpolation` must be 'bilinear' or 'bicubic'"),
        (lambda: randaugment.RandAugment(2, 31), r"`RandAugment\.magnitude` must be an int from 0 to 30, got 31"),
        (lambda: randaugment.RandAugment(-1), r"`RandAugment\.num_ops` must be an int >= 0"),
        (lambda: randaugment.RandAugment()(images().float(), generator(0)), "before Resize"),
        (lambda: RandomErasing(1.5), r"`RandomErasing\.p` must be a float in \[0, 1\]"),
        (lambda: RandomErasing(1.0, min_area=0.5), r"`RandomErasing\.min_area` must be a float in \(0, max_area=0.333"),
        (lambda: RandomErasing(1.0, max_area=2.0), r"`RandomErasing\.max_area` must be a float in \(0, 1\]"),
        (lambda: RandomErasing(1.0, min_aspect=2.0), r"`RandomErasing\.min_aspect` must be a float in \(0, 1\]"),
        (lambda: RandomErasing(1.0, fill="mean"), r"`RandomErasing\.fill` must be 'zero' or 'noise'"),
        (lambda: ColorJitter(contrast=1.5), r"`ColorJitter\.contrast` must be a float in \[0, 1\]"),
        (lambda: ColorJitter(hue=0.6), r"`ColorJitter\.hue` must be a float in \[0, 0.5\]"),
        (lambda: ColorJitter()(images(2, 1), generator(0)), "needs 3 channels, got 1"),
        (lambda: transforms.RandomCrop(33)(images(), generator(0)), r"`RandomCrop\.size` must be an int from 1 to 32"),
        (lambda: transforms.CenterCrop(33)(images(), generator(0)), r"`CenterCrop\.size` must be an int from 1 to 32"),
        (lambda: Pipeline([], [0.5], [0.0]), r"`data\.std` must be numbers > 0"),
        (lambda: Pipeline([], [0.5], [0.1, 0.2]), r"`data\.std` must be one number per channel, 1 as in `data\.mean`"),
    ],
)
def test_invalid_settings_are_refused(make, match: str) -> None:
    with pytest.raises(FewtokensError, match=match):
        make()
