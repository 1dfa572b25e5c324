"""Average pooling, the simplest method that keeps a grid."""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fewtokens.errors import check
from fewtokens.tokenizers.base import LayerContext, Pooler
from fewtokens.tokens import Tokens


class Pool(Pooler):
    """Averages the patches in every window of the grid before the block, which gives a smaller grid.

    This is a baseline without parameters that belongs to no paper. If the window does not divide the grid, the last
    windows are smaller, and their means are those of the patches in them. At several blocks, each pools what the
    previous one left; inside of TokenFuser, each sees the full grid.

    Args:
        context: The place in the encoder.
        window: Height and width of a window in patches, or one number for both.
    """

    def __init__(self, context: LayerContext, window: int | Sequence[int] = 2) -> None:
        sides = [window, window] if isinstance(window, int) else list(window)
        check(len(sides) == 2 and min(sides) >= 1, "tokenizer.build.window", "an int >= 1 or [height, width]", window)
        size = sides[0], sides[1]
        super().__init__(context, prod(pooled_grid(context.grid, size)))
        self.window = size

    def pool(self, tokens: Tokens) -> Tokens:
        """Return one token per window and frame, on the smaller grid."""
        grid = tokens.require_grid("Pool")
        patches = window_means(tokens.per_frame, grid, self.window)
        smaller = pooled_grid(grid, self.window)
        if tokens.origin is None:
            return tokens.resample(patches.reshape(tokens.x.shape[0], -1, patches.shape[2]), None, smaller)
        eye = torch.eye(prod(grid), dtype=patches.dtype, device=patches.device)
        weights = window_means(eye[None], grid, self.window).expand(patches.shape[0], -1, -1)
        return tokens.resample_per_frame(patches, weights, smaller)


def pooled_grid(grid: tuple[int, int], window: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width of the grid of windows."""
    return -(-grid[0] // window[0]), -(-grid[1] // window[1])


def window_means(
    patches: Float[Tensor, "b m c"], grid: tuple[int, int], window: tuple[int, int]
) -> Float[Tensor, "b s c"]:
    """Return the means of the patches (B, H*W, C) in each window (B, S, C), in row-major order."""
    x = patches.transpose(1, 2).unflatten(2, grid)
    x = F.avg_pool2d(x, window, ceil_mode=True, count_include_pad=False)
    return x.flatten(2).transpose(1, 2)
