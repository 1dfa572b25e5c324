"""Tubelets: the pixels of a clip in each token, and the frames that are embedded."""

from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor

from fewtokens.errors import FewtokensError
from fewtokens.layers.embedding import Pixels, TubeletEmbed, Tubelets, uniform_frames


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable pytest's type checks, which would reject wrong settings before our own checks do."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def embed(tubelets: Tubelets, per_step: bool = False, **settings: Any) -> TubeletEmbed:
    torch.manual_seed(0)
    return TubeletEmbed(tubelets, per_step, embed_dim=5, **settings).double()


def explicit(layer: TubeletEmbed, clip: Tensor) -> Tensor:
    """Compute the tokens (T, H, W, C) one by one, as the weighted sum of the pixels in the box of each."""
    cut = layer.tubelets
    clip = clip[:, cut.indices]
    tokens = torch.zeros(cut.steps, *cut.grid, 5, dtype=torch.float64)
    for t, y, x in np.ndindex(cut.steps, *cut.grid):
        box = clip[:, t * cut.frames :, y * cut.height :, x * cut.width :][:, : cut.frames, : cut.height, : cut.width]
        tokens[t, y, x] = (layer.proj.weight * box).sum(dim=(1, 2, 3, 4)) + layer.proj.bias
    return tokens


@torch.no_grad()
@pytest.mark.parametrize(
    "tubelets",
    [
        Tubelets(4, (6, 8), frames=2, height=3, width=4),
        Tubelets(3, (4, 6), channels=1, frames=3, height=2, width=1),
        Tubelets(2, 4, frames=1, height=4, width=4),
        Tubelets(9, (4, 6), frames=1, height=2, width=3, sampled_frames=4),
        Tubelets(9, 4, frames=2, height=2, width=2, sampled_frames=4),
    ],
    ids=str,
)
def test_a_token_is_the_weighted_sum_of_its_box(tubelets: Tubelets) -> None:
    clips = torch.randn(2, tubelets.channels, tubelets.clip_frames, *tubelets.sides, dtype=torch.float64)
    joint, by_step = embed(tubelets), embed(tubelets, per_step=True)
    expected = torch.stack([explicit(joint, clip) for clip in clips])
    torch.testing.assert_close(joint(clips), expected.flatten(1, 3))
    torch.testing.assert_close(by_step(clips), expected.flatten(0, 1).flatten(1, 2))
    assert (joint.num_patches, by_step.num_patches) == (expected[0, ..., 0].numel(), expected[0, 0, ..., 0].numel())


@torch.no_grad()
def test_an_image_is_a_clip_of_one_frame() -> None:
    layer, images = embed(Tubelets(1, 4, frames=1, height=2, width=2)), torch.randn(2, 3, 4, 4).double()
    assert torch.equal(layer(images), layer(images[:, :, None]))


@pytest.mark.parametrize(("frames", "sampled", "shown"), [(1, None, [0, 1, 2, 3]), (2, None, [1, 3]), (4, None, [2]),
                                                          (1, 2, [1, 3]), (2, 2, [3])])  # fmt: skip
def test_a_time_step_shows_its_middle_frame(frames: int, sampled: int | None, shown: list[int]) -> None:
    clips = torch.arange(4.0)[None, None, :, None, None].expand(2, 3, -1, 2, 2)
    cut = Tubelets(4, 2, frames=frames, height=2, width=2, sampled_frames=sampled)
    assert cut.central_frames(clips)[0, 0, :, 0, 0].tolist() == shown


@pytest.mark.parametrize(
    ("total", "count", "indices"),
    [
        (32, 8, [4, 7, 11, 14, 18, 21, 25, 28]),  # 3.56 7.11 10.67 14.2 17.8 21.3 24.9 28.4
        (8, 2, [3, 5]),
        (32, 2, [11, 21]),
        (16, 5, [3, 5, 8, 11, 13]),
        (5, 1, [2]),  # 2.5, rounded to the even number
        (3, 1, [2]),  # 1.5
        (4, 4, [0, 1, 2, 3]),
        (4, 9, [0, 1, 2, 3]),
        (1, 1, [0]),
        (2, 1, [1]),
    ],
)
def test_uniform_frames(total: int, count: int, indices: list[int]) -> None:
    assert uniform_frames(total, count) == indices


def test_the_number_of_frames_is_exact_and_the_frames_equal_the_official_ones_of_that_number() -> None:
    agreed = 0
    for total in range(1, 65):
        for count in range(1, total):
            found = uniform_frames(total, count)
            assert len(found) == count == len(set(found))
            assert found == sorted(found)
            assert 0 <= found[0] <= found[-1] < total
            step = total / (count + 1)
            official = np.round(np.arange(step, total, step).astype(np.float32)).clip(max=total - 1).astype(int)
            if len(official) == count:
                agreed += 1
                assert found == official.tolist()
    assert agreed > 1500


@torch.no_grad()
def test_sampled_frames_are_not_saved_and_move_with_the_device() -> None:
    layer = embed(Tubelets(9, 4, frames=1, height=2, width=2, sampled_frames=2))
    assert set(layer.state_dict()) == {"proj.weight", "proj.bias"}
    assert layer.to("meta")(torch.zeros(1, 3, 9, 4, 4, device="meta", dtype=torch.float64)).shape == (1, 8, 5)


@torch.no_grad()
def test_pixels_are_tokens_row_by_row() -> None:
    images = torch.randn(2, 5, 3, 2)
    assert torch.equal(Pixels((3, 2))(images)[1, 4], images[1, :, 2, 0])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"frames": 3}, "3 frames of 4x4 pixels do not tile 4 frames"),
        ({"frames": 0}, "0 frames of 4x4 pixels do not tile 4 frames"),
        ({"frames": 8}, "8 frames of 4x4 pixels do not tile 4 frames"),
        ({"height": 3}, "2 frames of 3x4 pixels do not tile 4 frames"),
        ({"width": 16}, "2 frames of 4x16 pixels do not tile 4 frames"),
        ({"sampled_frames": 3}, "2 frames of 4x4 pixels do not tile 3 frames"),
    ],
)
def test_tubelets_that_do_not_tile_the_clip_are_an_error(settings: dict[str, int], found: str) -> None:
    said = (
        rf"^Tubelets of {found} of 8x8\. Set backbone\.tubelets\.frames, \.height and \.width to divisors, or "
        r"data\.frames and data\.image_size\.$"
    )
    with pytest.raises(FewtokensError, match=said):
        Tubelets(4, 8, **{"height": 4, "width": 4, **settings})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"clip_frames": 0}, r"`data\.frames` must be an int >= 1, got 0\."),
        (
            {"clip_frames": 4, "sampled_frames": 0},
            r"`backbone\.tubelets\.sampled_frames` must be an int >= 1 or null, got 0\.",
        ),
    ],
)
def test_no_frames_are_an_error(settings: dict[str, int], said: str) -> None:
    with pytest.raises(FewtokensError, match=f"^{said}$"):
        Tubelets(image_size=8, **settings)


@pytest.mark.parametrize("settings", [{"dynamic_img_pad": True}, {"strict_img_size": False}, {"norm_layer": None}])
def test_options_for_images_of_any_size_are_an_error(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^clips have a fixed size and no embedding norm: "):
        embed(Tubelets(2, 16), **settings)
