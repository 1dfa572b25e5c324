"""Fixed pattern: keep the patches nearest to the centre of the picture, the floor that looks at nothing.

After the fixed radial patterns of Haurum et al., "Which Tokens to Use? Investigating Token Reduction in Vision
Transformers", 2023 (arXiv 2308.04657). That patches are ranked by l1, l2 or l-infinity distance was not checked there.
"""

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from fewtokens.errors import FewtokensError
from fewtokens.layers.block import Block
from fewtokens.tokenizers.base import LayerContext, Selector, highest, share
from fewtokens.tokens import Tokens

Distance = Literal["l1", "l2", "linf"]


class FixedPattern(Selector):
    """Before a block, the same patches of every frame stay: those nearest to the centre.

    It needs the lattice, so it stands once, ahead of every method that breaks it.

    Args:
        context: Where it stands.
        keep_rate: Share of the patches of a frame that stay, rounded up.
        distance: "l1" keeps a diamond, "l2" a disc, "linf" a rectangle.
    """

    keeps_frames = True

    def __init__(self, context: LayerContext, keep_rate: float = 0.5, distance: Distance = "l2") -> None:
        super().__init__(context, keep_rate)
        if distance not in ("l1", "l2", "linf"):
            raise FewtokensError(
                "FixedPattern measures a distance",
                expected="'l1', 'l2' or 'linf'",
                got=repr(distance),
                fix="set tokenizer.build.distance=l2",
            )
        self.distance: Distance = distance

    def forward(self, tokens: Tokens, block: Block) -> Tokens:
        """Drop, then the block."""
        grid = tokens.require_grid("FixedPattern")
        area = grid[0] * grid[1]
        if share(area, self.keep_rate) == area:
            return block(tokens)
        scores = -distances(grid, self.distance)[None].float()
        index = highest(scores, self.keep_rate)[0]
        whole = torch.cat([index + area * frame for frame in range(tokens.frames)], dim=1)
        kept = tokens.select(whole.to(tokens.x.device).expand(tokens.x.shape[0], -1))
        return block(replace(kept, frames=tokens.frames))


def distances(grid: tuple[int, int], distance: Distance) -> Int[Tensor, "m"]:
    """Distance of every patch to the centre of the lattice (H*W,), in half patches; l2 is squared.

    Whole numbers, so that patches at one distance are exactly equal (the first in reading order then counts as nearer).
    """
    rows, columns = (torch.arange(side).mul(2).sub(side - 1).abs() for side in grid)
    rows, columns = (part.flatten() for part in torch.meshgrid(rows, columns, indexing="ij"))
    if distance == "l1":
        return rows + columns
    return rows**2 + columns**2 if distance == "l2" else torch.maximum(rows, columns)
