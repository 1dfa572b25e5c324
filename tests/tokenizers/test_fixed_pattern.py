"""Fixed pattern: distances, ties, frames, and what it refuses."""

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


def kept(tokens: Tokens, keep: float, distance: str) -> list[int]:
    few = FixedPattern(CONTEXT, keep, distance)(tokens, Through())
    assert few.origin is not None
    assert torch.equal(few.origin @ tokens.patches, few.patches)
    assert torch.equal(few.x[:, :2], tokens.x[:, :2])
    assert torch.equal(few.origin[0], few.origin[1])
    assert (few.origin.sum(dim=2) == 1).all()
    return few.origin[0].argmax(dim=1).tolist()


def model(keep: float) -> ViT:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "num_classes": 5, "dim": 16, "depth": 2, "heads": 2}
    return vit(**sizes, tokenizer={"at": 1, "build": partial(FixedPattern, keep_rate=keep)}).eval()


@pytest.mark.parametrize("distance", ["l1", "l2", "linf"])
@pytest.mark.parametrize("grid", [(4, 5), (3, 3), (1, 6), (14, 14)])
@pytest.mark.parametrize("keep", [0.1, 0.3, 0.5, 0.9])
def test_the_nearest_patches_stay(distance: str, grid: tuple[int, int], keep: float) -> None:
    ys, xs = np.mgrid[: grid[0], : grid[1]]
    offsets = np.stack([ys - (grid[0] - 1) / 2, xs - (grid[1] - 1) / 2], axis=-1).reshape(-1, 2)
    exact = np.round(np.linalg.norm(offsets, ORDERS[distance], axis=1), 9)
    count = int(np.ceil(round(keep * len(exact), 9)))
    expected = sorted(sorted(range(len(exact)), key=lambda i: (exact[i], i))[:count])
    assert kept(clip(grid), keep, distance) == expected


def test_the_patterns_have_their_shapes() -> None:
    assert distances((3, 3), "l1").tolist() == [4, 2, 4, 2, 0, 2, 4, 2, 4]
    assert distances((3, 3), "l2").tolist() == [8, 4, 8, 4, 0, 4, 8, 4, 8]
    assert distances((2, 3), "linf").tolist() == [2, 1, 2, 2, 1, 2]
    assert kept(clip((3, 3)), 5 / 9, "l1") == [1, 3, 4, 5, 7]


def test_every_frame_keeps_the_same() -> None:
    assert kept(clip((3, 3), frames=2), 1 / 9, "l2") == [4, 13]


@torch.no_grad()
def test_keeping_all_is_the_plain_transformer_and_less_is_cheaper() -> None:
    images = torch.randn(2, 3, 16, 16)
    with (whole := model(1.0)).encoder.without_reduction():
        expected = whole(images)
    assert torch.equal(whole(images), expected)
    costs = [macs(model(keep), images[:1]) for keep in (0.25, 0.5, 0.75, 1.0)]
    assert costs == sorted(set(costs))


def test_gradients_and_autocast() -> None:
    tokens = clip()
    tokens.x.requires_grad_()
    FixedPattern(CONTEXT, 0.5)(tokens, Through()).patches.sum().backward()
    assert (tokens.x.grad[:, 2:, 0].sum(dim=1) == 10).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(0.5)(torch.randn(2, 3, 16, 16))).all()


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FewtokensError, match=r"FixedPattern needs patches on a lattice"):
        FixedPattern(CONTEXT, 0.5)(replace(clip(), grid=None), Through())
    with pytest.raises(FewtokensError, match=r"FixedPattern keeps a share"):
        FixedPattern(CONTEXT, 0.0)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(FewtokensError, match=r"measures a distance\. Expected: 'l1', 'l2' or 'linf'\. Found: 'l3'"):
        FixedPattern(CONTEXT, 0.5, "l3")
