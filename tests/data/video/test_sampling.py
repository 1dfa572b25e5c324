"""Frames and crops of a video: the official views, random clips in training, and edge cases."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fewtokens.data.seeding import generator
from fewtokens.data.video.records import VideoInfo
from fewtokens.data.video.sampling import FixedViews, Plan, RandomClip, corners, offsets
from fewtokens.errors import FewtokensError

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "vivit_multiview.npz")


def info(frames: int, width: int = 340, height: int = 256) -> VideoInfo:
    return VideoInfo(frames, width, height, 30.0, frames / 30, "any")


def windows(plan: Plan) -> np.ndarray:
    return np.stack(plan.windows)


@pytest.mark.parametrize("name", [name for name in GOLDEN.files if name.startswith("linspace")])
def test_clips_are_those_of_the_official_reader(name: str) -> None:
    length, frames, stride, count = map(int, re.findall(r"\d+", name))
    if count == 1:  # the official reader does not use this for one clip, which is at the center
        assert offsets(length, frames * stride, 1)[0] == max(0, length - frames * stride) // 2
        return
    plan = FixedViews(frames, stride, 224, 256, clips=count).plan(info(length), generator(0))
    assert np.array_equal(windows(plan), GOLDEN[name])


@pytest.mark.parametrize("name", [name for name in GOLDEN.files if name.startswith("centre")])
def test_one_clip_is_the_official_center(name: str) -> None:
    length, frames, stride = map(int, re.findall(r"\d+", name))
    plan = FixedViews(frames, stride, 224, 256).plan(info(length), generator(0))
    assert np.array_equal(windows(plan)[0], GOLDEN[name])


@pytest.mark.parametrize("name", [name for name in GOLDEN.files if name.startswith("crops")])
def test_crops_are_the_official_ones(name: str) -> None:
    height, width, side = map(int, re.findall(r"\d+", name))
    assert corners(height, width, side, 3) == [tuple(corner) for corner in GOLDEN[name].tolist()]
    assert corners(height, width, side, 1) == [tuple(GOLDEN[name][1].tolist())]


def test_views_come_crop_by_crop_and_each_is_its_window() -> None:
    video = np.random.default_rng(0).integers(0, 256, (40, 3, 20, 31), dtype=np.uint8)
    plan = FixedViews(4, 3, 16, clips=2, crops=3).plan(info(40, 31, 20), generator(0))
    out = np.zeros((6, 4, 16, 16, 3), np.uint8)
    plan.cut(video[plan.needed()], out)
    for view, (crop, clip) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]):
        top, left = plan.corners[crop]
        expected = video[plan.windows[clip], :, top : top + 16, left : left + 16]
        assert np.array_equal(out[view].transpose(0, 3, 1, 2), expected)
    assert [left for _, left in plan.corners] == [0, 8, 15]
    assert plan.windows[0].tolist() == [0, 3, 6, 9]
    assert plan.windows[1].tolist() == [28, 31, 34, 37]


@pytest.mark.parametrize("length", [1, 2, 5, 62, 63, 64, 250])
def test_random_clips_begin_anywhere_and_short_videos_begin_again(length: int) -> None:
    sampling = RandomClip(32, 2, 224, 256)
    seen = [sampling.plan(info(length), generator(3, i)).windows[0] for i in range(300)]
    starts = {int(window[0]) for window in seen}
    assert starts <= set(range(max(1, length - 62)))
    assert len(starts) == {1: 1, 2: 1, 5: 1, 62: 1, 63: 1, 64: 2}.get(length, len(starts))
    if length == 250:
        assert len(starts) > 100
        assert max(starts) == 187
        assert max(int(window[-1]) for window in seen) == 249
    for window in seen:
        assert np.array_equal(window, (window[0] + 2 * np.arange(32)) % length)


def test_random_crops_lie_inside_and_scales_reach_both_ends() -> None:
    sampling = RandomClip(2, 1, 224, 256, (0.9, 1.33))
    plans = [sampling.plan(info(9), generator(4, i)) for i in range(400)]
    scales = [plan.short_side for plan in plans]
    assert min(scales) <= 232
    assert max(scales) >= 338
    assert 270 < np.mean(scales) < 300
    for plan in plans:
        width, height = info(9).size(plan.short_side)
        (top, left) = plan.corners[0]
        assert 0 <= top <= height - 224
        assert 0 <= left <= width - 224
    exact = [RandomClip(1, 1, 20).plan(info(5, 22, 21), generator(5, i)).corners[0] for i in range(300)]
    assert set(exact) == {(top, left) for top in range(2) for left in range(3)}


def test_draws_are_a_function_of_the_generator() -> None:
    sampling = RandomClip(8, 2, 224, 256, (0.9, 1.33))
    plans = [sampling.plan(info(300), generator(1, i)) for i in (0, 0, 1)]
    assert windows(plans[0]).tolist() == windows(plans[1]).tolist()
    assert (plans[0].corners, plans[0].short_side) == (plans[1].corners, plans[1].short_side)
    assert (plans[0].corners, plans[0].short_side) != (plans[2].corners, plans[2].short_side)
    before = torch.get_rng_state()
    sampling.plan(info(300), generator(1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: RandomClip(8, 1, 224, 200), "image_size` must be at most .* got 224 and 200 pixels"),
        (lambda: RandomClip(8, 1, 224, 240, (0.9, 1.0)), "got 224 and 216 pixels"),
        (lambda: RandomClip(8, 1, 32, None, (0.9, 1.1)), r"\[1, 1\] if `data.resize` is null"),
        (lambda: RandomClip(8, 1, 32, 64, (1.1, 0.9)), "smallest, largest"),
        (lambda: FixedViews(8, 1, 224, 200), "got 224 and 200"),
        (lambda: FixedViews(8, 1, 32, clips=0), "clips >= 1, got 0"),
        (lambda: FixedViews(8, 1, 32, crops=2), r"views\[1\]` must be 1 or 3, got 2"),
        (lambda: FixedViews(8, 1, 32).plan(info(9, 40, 31), generator(0)), r"40 x 31 pixels. Set data\.resize=32"),
        (lambda: RandomClip(8, 1, 32).plan(info(9, 31, 40), generator(0)), "31 x 40 pixels"),
    ],
)
def test_what_cannot_be_is_refused(make, match: str) -> None:
    with pytest.raises(FewtokensError, match=match):
        make()
