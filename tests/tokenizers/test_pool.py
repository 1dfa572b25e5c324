"""Average pooling: means, grids that the window does not divide, frames, TokenFuser around it, and errors."""

import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from fewtokens.analysis.cost import macs
from fewtokens.backbones.vit import ViT, vit
from fewtokens.errors import FewtokensError
from fewtokens.tokenizers.base import LayerContext
from fewtokens.tokenizers.pool import Pool, pooled_grid
from fewtokens.tokenizers.token_fuser import TokenFuser
from fewtokens.tokens import Tokens


def context(grid: tuple[int, int] = (4, 5)) -> LayerContext:
    return LayerContext(dim=8, heads=2, block=0, depth=1, prefix=2, grid=grid)


def clip(grid: tuple[int, int] = (4, 5), frames: int = 1) -> Tokens:
    count = grid[0] * grid[1] * frames
    return Tokens(torch.randn(2, 2 + count, 8), 2, frames, grid, origin=torch.eye(count).expand(2, -1, -1))


def model(build: object, at: object = (1,)) -> ViT:
    torch.manual_seed(0)
    sizes = {"image_size": 20, "patch_size": 4, "num_classes": 5, "dim": 16, "depth": 3, "heads": 2}
    return vit(**sizes, tokenizer={"at": at, "build": build}).eval()


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("grid", [(4, 5), (3, 3), (1, 6)])
@pytest.mark.parametrize("window", [1, 2, 4, 9, [1, 3], [3, 1]])
def test_every_window_becomes_its_mean(window: int | list[int], grid: tuple[int, int], frames: int) -> None:
    tokens = clip(grid, frames)
    few = Pool(context(grid), window).pool(tokens)
    height, width = (window, window) if isinstance(window, int) else window
    maps = tokens.patches.reshape(2, frames, *grid, 8).double().numpy()
    expected = [
        maps[:, t, y : y + height, x : x + width].mean(axis=(1, 2))
        for t in range(frames)
        for y in range(0, grid[0], height)
        for x in range(0, grid[1], width)
    ]
    np.testing.assert_allclose(few.patches, np.stack(expected, axis=1), rtol=1e-5, atol=1e-6)
    assert few.grid == pooled_grid(grid, (height, width))
    assert (few.frames, few.prefix) == (frames, 2)
    assert torch.equal(few.x[:, :2], tokens.x[:, :2])
    assert Pool(context(grid), window).num_tokens * frames == few.num_patches
    assert few.origin is not None
    assert ((few.origin > 0).sum(dim=1) == 1).all()
    torch.testing.assert_close(few.origin @ tokens.patches, few.patches)
    assert torch.equal(Pool(context(grid), window).pool(replace(tokens, origin=None)).x, few.x)


@torch.no_grad()
def test_windows_of_one_patch_are_the_plain_transformer_and_larger_ones_are_cheaper() -> None:
    images = torch.randn(2, 3, 20, 20)
    with (complete := model(partial(Pool, window=1))).encoder.without_reduction():
        expected = complete(images)
    assert torch.equal(complete(images), expected)
    costs = [macs(model(partial(Pool, window=window)), images[:1]) for window in (5, 3, 2, 1)]
    assert costs == sorted(set(costs))


@torch.no_grad()
def test_it_can_pool_twice_and_token_fuser_wraps_it() -> None:
    images = torch.randn(2, 3, 20, 20)
    grids = [tokens.grid for tokens in model(Pool, at=[1, 2]).trace(images)]
    assert grids == [(5, 5), (3, 3), (2, 2)]
    fused = model(partial(TokenFuser, inner=Pool), at=[1, 2])
    assert [tokens.num_patches for tokens in fused.trace(images)] == [25, 9, 9]
    assert torch.isfinite(fused(images)).all()


def test_gradients_under_autocast(check_autocast) -> None:
    check_autocast(model(Pool))


@pytest.mark.parametrize("window", [0, [2], [2, 0], [1, 1, 1]])
def test_invalid_windows(window: object) -> None:
    message = rf"^`tokenizer\.build\.window` must be an int >= 1 or \[height, width\], got {re.escape(str(window))}\.$"
    with pytest.raises(FewtokensError, match=message):
        Pool(context(), window)


def test_an_incomplete_grid_and_padding_are_errors() -> None:
    with pytest.raises(FewtokensError, match=r"^Pool needs patch tokens on a complete \(height, width\) grid"):
        Pool(context()).pool(replace(clip(), grid=None))
    with pytest.raises(FewtokensError, match=r"^Pool needs patch tokens on a complete \(height, width\) grid"):
        Pool(context()).pool(replace(clip(), mask=torch.ones(2, 22, dtype=torch.bool)))
