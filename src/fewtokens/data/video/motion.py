"""Pictures that move on a torus, in such a way that no single frame tells how.

Column, row, angle and scale are phases that go round, each uniform between 0 and 1. A motion carries one of them
forward or back at a steady speed and leaves the others: u + v t modulo 1 is uniform if u is, so in every frame of every
motion all four are uniform and independent, and only their change from frame to frame differs.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

SIDE = 32  # pixels of a frame
# Which phase a motion carries, and in which direction; in the order of class folders, by name.
MOTIONS = {
    "clockwise": (2, 1),
    "counterclockwise": (2, -1),
    "down": (1, 1),
    "grow": (3, 1),
    "left": (0, -1),
    "right": (0, 1),
    "shrink": (3, -1),
    "up": (1, -1),
}
_SPEED = (0.05, 0.1)  # rounds per frame: 1.6 to 3.2 pixels, 18 to 36 degrees, 6 to 12 % of the size
_SMALLEST, _LARGEST = 10.0, 30.0  # pixels: side of the picture; its digit fills about two thirds


def phases(labels: Int[Tensor, " n"], frames: int, draws: torch.Generator) -> Float[Tensor, "n t 4"]:
    """Column, row, angle and scale of every frame, from 0 to 1, for motions by their numbers in `MOTIONS`."""
    table = torch.zeros(len(MOTIONS), 4, dtype=torch.float64)
    for row, (phase, direction) in zip(table, MOTIONS.values(), strict=True):
        row[phase] = direction
    start = torch.rand(len(labels), 1, 4, generator=draws, dtype=torch.float64)
    speed = torch.empty(len(labels), 1, 1, dtype=torch.float64).uniform_(*_SPEED, generator=draws)
    return (start + speed * table[labels][:, None] * torch.arange(frames)[:, None]) % 1


def draw(pictures: UInt8[Tensor, "n h w"], phases: Float[Tensor, "n t 4"]) -> UInt8[Tensor, "n t 32 32"]:
    """The pictures as their phases say, bilinear, on black; what leaves on one side comes back on the other."""
    column, row, angle, scale = (phase[..., None, None] for phase in phases.unbind(-1))
    centres = torch.arange(SIDE) + 0.5
    across, down = _around(centres[None, :] - column * SIDE), _around(centres[:, None] - row * SIDE)
    cosine, sine = (2 * math.pi * angle).cos(), (2 * math.pi * angle).sin()
    half = 0.5 * _SMALLEST * (_LARGEST / _SMALLEST) ** scale
    grid = torch.stack([across * cosine + down * sine, down * cosine - across * sine], dim=-1) / half[..., None]
    shape = grid.shape[:-1]  # n, t, rows, columns; all frames of a video are one tall picture to grid_sample
    drawn = F.grid_sample(pictures[:, None].double(), grid.flatten(1, 2), align_corners=False)
    return drawn.view(shape).round().to(torch.uint8)


def _around(offset: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The shortest way on the torus, between -SIDE / 2 and SIDE / 2."""
    return (offset + SIDE / 2) % SIDE - SIDE / 2
