"""Fixed pattern: distances, complete rings, several stages, frames, and errors."""

from dataclasses import replace
from functools import partial

import jaxtyping
import numpy as np
import pytest
import torch

from fewtokens.analysis.cost import macs
from fewtokens.backbones.vit import ViT, vit
from fewtokens.errors import FewtokensError
from fewtokens.layers.attention import Attention
from fewtokens.layers.block import Block
from fewtokens.tokenizers.base import LayerContext
from fewtokens.tokenizers.fixed_pattern import FixedPattern, distances
from fewtokens.tokens import Tokens

CONTEXT = LayerContext(dim=8, heads=2, block=0, depth=1, prefix=2, grid=(4, 5))
ORDERS = {"l1": 1, "l2": 2, "linf": np.inf}


class Through(Block):
    """A block that does nothing."""

    def __init__(self) -> None:
        super().__init__(8, 2, attn_layer=Attention)

    def forward(self, tokens: Tokens) -> Tokens:
        return tokens


def clip(grid: tuple[int, int] = (4, 5), frames: int = 1) -> Tokens:
    count = grid[0] * grid[1] * frames
    return Tokens(torch.randn(2, 2 + count, 8), 2, frames, grid, origin=torch.eye(count).expand(2, -1, -1))


def stages(grid: tuple[int, int], rates: list[float] | float, count: int, distance: str = "l2") -> list[FixedPattern]:
    contexts = [replace(CONTEXT, grid=grid, stage=stage, stages=count) for stage in range(count)]
    return [FixedPattern(context, rates, distance) for context in contexts]


def kept(tokens: Tokens, methods: list[FixedPattern]) -> list[int]:
    """Return the patches that are left after some stages, and check that they are unchanged."""
    few = tokens
    for method in methods:
        few = method(few, Through())
    assert few.origin is not None
    assert torch.equal(few.origin @ tokens.patches, few.patches)
    assert torch.equal(few.x[:, :2], tokens.x[:, :2])
    assert torch.equal(few.origin[0], few.origin[1])
    assert (few.origin.sum(dim=2) == 1).all()
    assert few.frames == tokens.frames
    return few.origin[0].argmax(dim=1).tolist()


def by_hand(grid: tuple[int, int], share: float, distance: str) -> list[int]:
    """Return the patches of the complete rings whose number is nearest to the share, by enumeration."""
    ys, xs = np.mgrid[: grid[0], : grid[1]]
    offsets = np.stack([ys - (grid[0] - 1) / 2, xs - (grid[1] - 1) / 2], axis=-1).reshape(-1, 2)
    exact = np.round(np.linalg.norm(offsets, ORDERS[distance], axis=1), 9)
    discs = [np.flatnonzero(exact <= radius).tolist() for radius in np.unique(exact)]
    return min(discs, key=lambda disc: (round(abs(len(disc) - share * len(exact)), 6), len(disc)))


def model(keep: float | list[float], at: object = 1) -> ViT:
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 4, "num_classes": 5, "dim": 16, "depth": 3, "heads": 2}
    return vit(**sizes, tokenizer={"at": at, "build": partial(FixedPattern, keep_rate=keep)}).eval()


@pytest.mark.parametrize("distance", ["l1", "l2", "linf"])
@pytest.mark.parametrize("grid", [(4, 5), (3, 3), (1, 6), (14, 14)])
@pytest.mark.parametrize("keep", [0.1, 0.3, 0.5, 0.9])
def test_the_complete_rings_nearest_to_the_share_stay(distance: str, grid: tuple[int, int], keep: float) -> None:
    found = kept(clip(grid), stages(grid, keep, 1, distance))
    assert found == by_hand(grid, keep, distance)
    rows, columns = np.unravel_index(found, grid)
    mirrored = np.ravel_multi_index((grid[0] - 1 - rows, grid[1] - 1 - columns), grid)
    assert sorted(mirrored.tolist()) == found, "the pattern is symmetric"


@pytest.mark.parametrize("rates", [0.7, [0.5, 0.9, 0.3], [1.0, 0.5, 1.0]])
@pytest.mark.parametrize("distance", ["l1", "l2", "linf"])
def test_every_stage_keeps_complete_rings_of_the_full_grid(distance: str, rates: float | list[float]) -> None:
    methods = stages((8, 8), rates, 3, distance)
    shares = np.cumprod([rates] * 3 if isinstance(rates, float) else rates)
    for stage, share in enumerate(shares):
        assert kept(clip((8, 8)), methods[: stage + 1]) == by_hand((8, 8), share, distance)


def test_the_patterns_have_their_shapes() -> None:
    assert distances((3, 3), "l1") == [4, 2, 4, 2, 0, 2, 4, 2, 4]
    assert distances((3, 3), "l2") == [8, 4, 8, 4, 0, 4, 8, 4, 8]
    assert distances((2, 3), "linf") == [2, 1, 2, 2, 1, 2]
    assert kept(clip((3, 3)), stages((3, 3), 5 / 9, 1, "l1")) == [1, 3, 4, 5, 7]


def test_of_two_equally_near_numbers_the_smaller_one_stays() -> None:
    assert kept(clip((3, 3)), stages((3, 3), 3 / 9, 1, "l1")) == [4]


def test_every_frame_keeps_the_same() -> None:
    assert kept(clip((3, 3), frames=2), stages((3, 3), 1 / 9, 1)) == [4, 13]
    assert kept(clip((3, 3), frames=2), stages((3, 3), [5 / 9, 1 / 5], 2)) == [4, 13]


@torch.no_grad()
def test_keeping_all_is_the_plain_transformer_and_less_is_cheaper() -> None:
    images = torch.randn(2, 3, 32, 32)
    for at in (1, [0, 2]):
        with (complete := model(1.0, at)).encoder.without_reduction():
            expected = complete(images)
        assert torch.equal(complete(images), expected)
        costs = [macs(model(keep, at), images[:1]) for keep in (0.25, 0.5, 0.75, 1.0)]
        assert costs == sorted(set(costs))


def test_gradients_and_autocast() -> None:
    tokens = clip((4, 4))
    tokens.x.requires_grad_()
    stages((4, 4), 0.25, 1)[0](tokens, Through()).patches.sum().backward()
    assert (tokens.x.grad[:, 2:, 0].sum(dim=1) == 4).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(0.5)(torch.randn(2, 3, 32, 32))).all()


def test_another_grid_than_that_of_the_model_works_at_one_block_only() -> None:
    assert kept(clip((3, 3)), [FixedPattern(CONTEXT, 1 / 9)]) == [4]
    message = r"^FixedPattern at several blocks needs the grid that the model was built for, \(4, 5\), got \(5, 4\)\."
    with pytest.raises(FewtokensError, match=message):
        stages((4, 5), 0.5, 2)[0](clip((5, 4)), Through())


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FewtokensError, match=r"^FixedPattern needs patch tokens on a complete \(height, width\) grid"):
        FixedPattern(CONTEXT, 0.5)(replace(clip(), grid=None), Through())
    with pytest.raises(FewtokensError, match=r"^`tokenizer\.build\.keep_rate` must be above 0 and at most 1, got 0\.0"):
        FixedPattern(CONTEXT, 0.0)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    message = r"^`tokenizer\.build\.distance` must be 'l1' or 'l2' or 'linf', got 'l3'\.$"
    with pytest.raises(FewtokensError, match=message):
        FixedPattern(CONTEXT, 0.5, "l3")
