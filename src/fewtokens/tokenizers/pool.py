"""Average pooling: the plainest way to fewer tokens that keeps a lattice."""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fewtokens.errors import FewtokensError
from fewtokens.tokenizers.base import LayerContext, Pooler
from fewtokens.tokens import Tokens


class Pool(Pooler):
    """Before a block, every window of the lattice becomes the mean of its patches, on a smaller lattice.

    A baseline of no one paper, without parameters. Where the window does not divide the lattice, the last windows are
    smaller, and their means are those of the patches that they hold. In front of several blocks, each pools what the
    one before left; a TokenFuser around it sees the whole lattice each time.

    Args:
        context: Where it stands.
        window: Height and width of a window in patches, or one number for both.
    """

    def __init__(self, context: LayerContext, window: int | Sequence[int] = 2) -> None:
        sides = (window, window) if isinstance(window, int) else tuple(window)
        if len(sides) != 2 or min(sides) < 1:
            raise FewtokensError(
                "Pool takes means over windows of patches",
                expected="a window of 1 or more, or [height, width]",
                got=window,
                fix="set tokenizer.build.window=2",
            )
        super().__init__(context, prod(windows(context.grid, sides)))
        self.window = sides

    def pool(self, tokens: Tokens) -> Tokens:
        """One token per window and frame; the lattice shrinks."""
        grid = tokens.require_grid("Pool")
        patches = average(tokens.per_frame, grid, self.window)
        smaller = windows(grid, self.window)
        if tokens.origin is None:
            return tokens.resample(patches.reshape(tokens.x.shape[0], -1, patches.shape[2]), None, smaller)
        every = torch.eye(prod(grid), dtype=patches.dtype, device=patches.device)
        shares = average(every[None], grid, self.window).expand(patches.shape[0], -1, -1)
        return tokens.resample_per_frame(patches, shares, smaller)


def windows(grid: tuple[int, int], window: tuple[int, int]) -> tuple[int, int]:
    """How many windows there are from top to bottom and from left to right."""
    return -(-grid[0] // window[0]), -(-grid[1] // window[1])


def average(patches: Float[Tensor, "b m c"], grid: tuple[int, int], window: tuple[int, int]) -> Float[Tensor, "b s c"]:
    """Means over windows of patches (B, H*W, C), row by row (B, S, C)."""
    x = patches.transpose(1, 2).unflatten(2, grid)
    x = F.avg_pool2d(x, window, ceil_mode=True, count_include_pad=False)
    return x.flatten(2).transpose(1, 2)
