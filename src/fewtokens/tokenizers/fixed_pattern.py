"""A fixed pattern around the center of the image, the baseline that ignores the content.

The radial patterns of Haurum et al., "Which Tokens to Use? Investigating Token Reduction in Vision Transformers", 2023
(arXiv 2308.04657), as in their code, JoakimHaurum/TokenReduction (`models/heuristic.py`, option `--not_contiguous`).
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from math import prod
from typing import Literal

import torch

from fewtokens.errors import FewtokensError, check_choice
from fewtokens.layers.block import Block
from fewtokens.tokenizers.base import ROUNDING, KeepRate, LayerContext, Selector, keep_rates
from fewtokens.tokens import Tokens

Grid = tuple[int, int]
Distance = Literal["l1", "l2", "linf"]
DISTANCES: dict[str, Callable[[int, int], int]] = {
    "l1": lambda y, x: y + x,
    "l2": lambda y, x: y * y + x * x,
    "linf": max,
}


class FixedPattern(Selector):
    """Keeps the patches nearest to the center, the same ones in every frame and image, before the block.

    A ring consists of all patches at one distance from the center. Only complete rings are kept, so that the pattern is
    symmetric: the innermost ones whose number of patches is nearest to the share, and the fewer of two equally near
    numbers. Each stage takes them from the rings of the full grid, which the previous stages' keep rates determine.

    In the official code, dropped patches stay in the batch and are masked in attention, and in a grid with an odd side
    the pattern is half a patch off the center.

    Args:
        context: The place in the encoder.
        keep_rate: Share of the patches of a frame that stay, see `Selector`, but rounded to complete rings.
        distance: "l1" keeps a diamond, "l2" a disc, and "linf" a rectangle.
    """

    keeps_frames = True

    def __init__(self, context: LayerContext, keep_rate: KeepRate = 0.5, distance: Distance = "l2") -> None:
        super().__init__(context, keep_rate)
        check_choice("tokenizer.build.distance", distance, DISTANCES)
        rates = keep_rates(keep_rate, context)
        self.share_before, self.share = (
            prod(rates[:stages], start=1.0) for stages in (context.stage, context.stage + 1)
        )
        self.distance: Distance = distance
        self.positions = self._select(context.grid)

    def forward(self, tokens: Tokens, block: Block) -> Tokens:
        """Drop the outer rings and run the block."""
        positions = self.positions if self.context.stage else self._first_positions(tokens)
        per_frame = tokens.num_patches // tokens.frames
        if len(positions) == per_frame:
            return block(tokens)
        index = torch.tensor(positions, device=tokens.x.device)
        index = index + per_frame * torch.arange(tokens.frames, device=tokens.x.device)[:, None]
        kept = tokens.select(index.flatten().expand(tokens.x.shape[0], -1))
        return block(replace(kept, frames=tokens.frames))

    def _first_positions(self, tokens: Tokens) -> list[int]:
        grid = tokens.require_grid("FixedPattern")
        if grid == self.context.grid:
            return self.positions
        if self.context.stages > 1:  # Later stages cannot see which patches of this grid are left.
            raise FewtokensError(
                f"FixedPattern at several blocks needs the grid that the model was built for, {self.context.grid}, got "
                f"{grid}. Use it at one block (tokenizer.at), or images of the size data.image_size."
            )
        return self._select(grid)

    def _select(self, grid: Grid) -> list[int]:
        """Return the positions that stay, among the patches that the previous stages left of a frame."""
        rings = distances(grid, self.distance)
        outer, inner = radius(rings, self.share_before), radius(rings, self.share)
        return [i for i, ring in enumerate(ring for ring in rings if ring <= outer) if ring <= inner]


def distances(grid: Grid, distance: Distance) -> list[int]:
    """Return the distance of every patch to the center of the grid, in row-major order.

    The unit is half a patch, and l2 distances are squared: with integers, patches at the same distance are exactly
    equal.
    """
    rows, columns = ([abs(2 * i + 1 - side) for i in range(side)] for side in grid)
    return [DISTANCES[distance](y, x) for y in rows for x in columns]


def radius(rings: list[int], share: float) -> int:
    """Return the distance up to which the number of patches is nearest to `share` of all.

    Args:
        rings: Distance of every patch.
        share: Share of the patches. Of two numbers that are equally near, the smaller one is taken.
    """
    counts = sorted(Counter(rings).items())
    totals = accumulate(count for _, count in counts)
    target = share * len(rings) - ROUNDING  # so that a tie goes to the smaller number also after rounding errors
    return min(zip(totals, counts, strict=True), key=lambda ring: abs(ring[0] - target))[1][0]
