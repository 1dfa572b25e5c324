"""Pictures with maps over them: heat, covers, colours of groups, and a figure of many."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from torch import Tensor

LEAST_PIXELS = 128  # small pictures are enlarged to this, or the maps over them would be coarse too
COVER = (0.42, 0.47, 0.58)  # over dropped patches: neither the black nor the white that pictures have


@dataclass(frozen=True)
class Column:
    """One column of the picture: a title, a picture per image, a note in each."""

    title: str
    pictures: Float[Tensor, "b 3 h w"]
    notes: list[str]


def displayed(images: Float[Tensor, "b c h w"], together: int = 1) -> Float[Tensor, "b 3 h2 w2"]:
    """Images of any number of channels as pictures between 0 and 1, from the least to the greatest value of each.

    Args:
        images: (B, C, H, W).
        together: So many that follow each other, the frames of a clip, have least and greatest in common.
    """
    images = images.float().cpu()
    if images.shape[1] != 3:
        images = images.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    clips = images.unflatten(0, (-1, together))
    clips = clips - clips.amin(dim=(1, 2, 3, 4), keepdim=True)
    images = (clips / clips.amax(dim=(1, 2, 3, 4), keepdim=True).clamp_min(1e-6)).flatten(0, 1)
    return F.interpolate(images, scale_factor=max(1, -(-LEAST_PIXELS // min(images.shape[2:]))), mode="nearest")


def heat(
    pictures: Float[Tensor, "b 3 h w"], shares: Float[Tensor, "b patches"], grid: tuple[int, int], together: int = 1
) -> Float[Tensor, "b 3 h w"]:
    """A token's share of every patch, from its least to its greatest, as colours over the grey picture.

    Args:
        pictures: (B, 3, H, W).
        shares: Of the patches (B, patches).
        grid: Of the patches.
        together: So many pictures that follow each other have least and greatest in common: those that a token spans.
    """
    clips = shares.unflatten(0, (-1, together))
    low, high = clips.amin(dim=(1, 2), keepdim=True), clips.amax(dim=(1, 2), keepdim=True)
    # A map that is the same everywhere stays so: stretched, it would show rounding errors.
    scaled = (clips - low) / (high - low).clamp_min(1e-3 * high.clamp_min(1e-12))
    size = (pictures.shape[2], pictures.shape[3])
    fine = F.interpolate(scaled.reshape(-1, 1, *grid), size=size, mode="bilinear")[:, 0]
    colours = torch.from_numpy(colormaps["inferno"](fine.numpy())[..., :3]).float().permute(0, 3, 1, 2)
    return 0.3 * pictures.mean(dim=1, keepdim=True) + 0.7 * colours


def covered(
    pictures: Float[Tensor, "b 3 h w"], kept: Bool[Tensor, "b patches"], grid: tuple[int, int]
) -> Float[Tensor, "b 3 h w"]:
    """The pictures with everything but the kept patches covered."""
    shown = _enlarged(kept.int(), grid, pictures).bool()
    return torch.where(shown, pictures, 0.15 * pictures + 0.85 * torch.tensor(COVER).view(3, 1, 1))


def coloured(
    pictures: Float[Tensor, "b 3 h w"], groups: Int[Tensor, "b patches"], grid: tuple[int, int]
) -> Float[Tensor, "b 3 h w"]:
    """The pictures with every group of several patches in a colour, and lines around them."""
    several = (groups[:, :, None] == groups[:, None, :]).sum(dim=2) > 1
    steps = np.arange(int(groups.max()) + 1)
    # The golden ratio spreads any number of hues evenly; twenty fixed colours would come round again.
    hues = np.stack([steps * 0.618034 % 1, 0.5 + steps % 3 * 0.2, 0.75 + steps % 2 * 0.25], axis=1)
    palette = torch.from_numpy(hsv_to_rgb(hues)).float()
    labels, merged = (_enlarged(values, grid, pictures)[:, 0] for values in (groups, several.int()))
    colours = palette[labels].permute(0, 3, 1, 2)
    tinted = torch.where(merged[:, None].bool(), 0.35 * pictures + 0.65 * colours, pictures)
    edge = torch.zeros_like(labels, dtype=torch.bool)
    edge[:, 1:] |= (labels[:, 1:] != labels[:, :-1]) & (merged[:, 1:] + merged[:, :-1] > 0)
    edge[:, :, 1:] |= (labels[:, :, 1:] != labels[:, :, :-1]) & (merged[:, :, 1:] + merged[:, :, :-1] > 0)
    return torch.where(edge[:, None], torch.ones(()), tinted)


def draw(columns: Sequence[Column], labels: Sequence[str] = ()) -> Figure:
    """The figure, one row per image; without pyplot, whose open figures are global.

    Args:
        columns: From left to right.
        labels: A word to the left of every row.
    """
    rows, (height, width) = len(columns[0].pictures), columns[0].pictures.shape[2:]
    cell, head, side = (1.0, height / width), 0.36, 0.85 if labels else 0.0  # inches
    wide, high = cell[0] * len(columns) + side, cell[1] * rows + head
    figure = Figure(figsize=(wide, high), dpi=120, facecolor="white")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    left = side / wide + 0.005
    figure.subplots_adjust(left=left, right=0.995, bottom=0.005, top=1 - head / high, wspace=0.05, hspace=0.05)
    for row, label in enumerate(labels):
        axis = axes[row, 0]
        axis.text(-0.06, 0.5, label, transform=axis.transAxes, ha="right", va="center", fontsize=7)
    for place, column in enumerate(columns):
        axes[0, place].set_title(column.title, fontsize=7, pad=3)
        for row, (picture, note) in enumerate(zip(column.pictures, column.notes, strict=True)):
            axis = axes[row, place]
            axis.imshow(picture.clamp(0, 1).permute(1, 2, 0).numpy())
            axis.set_axis_off()
            badge = {"facecolor": "black", "edgecolor": "none", "alpha": 0.65, "pad": 1.2}
            if note:
                axis.text(0.97, 0.04, note, transform=axis.transAxes, ha="right", fontsize=6, color="white", bbox=badge)
    return figure


def pixels(figure: Figure) -> UInt8[np.ndarray, "height width 3"]:
    """A figure as an image."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _enlarged(
    values: Int[Tensor, "b patches"], grid: tuple[int, int], pictures: Float[Tensor, "b 3 h w"]
) -> Int[Tensor, "b 1 h w"]:
    maps = values.reshape(-1, 1, *grid)
    down = torch.arange(pictures.shape[2]) * grid[0] // pictures.shape[2]
    across = torch.arange(pictures.shape[3]) * grid[1] // pictures.shape[3]
    return maps[:, :, down][:, :, :, across]
