"""Pictures with maps on top of them (heat maps, covered patches, colored groups), and a figure of many pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from fewtokens.files import replace_file

MIN_PIXELS = 128  # smaller pictures are enlarged to this, because the maps on top of them would be too coarse
COVER = (0.42, 0.47, 0.58)  # color of dropped patches: not black or white, which are frequent in pictures
BADGE = {"facecolor": "black", "edgecolor": "none", "alpha": 0.65, "pad": 1.2}


@dataclass(frozen=True)
class Column:
    """One column of a figure: a title, and a picture and a note for every row."""

    title: str
    pictures: Float[Tensor, "b 3 h w"]
    notes: list[str]


def displayed(images: Float[Tensor, "b c h w"], together: int = 1) -> Float[Tensor, "b 3 h2 w2"]:
    """Return images of any number of channels as RGB pictures, scaled to the range from 0 to 1.

    Args:
        images: (B, C, H, W).
        together: Number of consecutive images, the frames of a clip, that are scaled by common limits.
    """
    images = images.float().cpu()
    if images.shape[1] != 3:
        images = images.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    clips = images.unflatten(0, (-1, together))
    clips = clips - clips.amin(dim=(1, 2, 3, 4), keepdim=True)
    images = (clips / clips.amax(dim=(1, 2, 3, 4), keepdim=True).clamp_min(1e-6)).flatten(0, 1)
    return F.interpolate(images, scale_factor=max(1, -(-MIN_PIXELS // min(images.shape[2:]))), mode="nearest")


def heat(
    pictures: Float[Tensor, "b 3 h w"], shares: Float[Tensor, "b patches"], grid: tuple[int, int], together: int = 1
) -> Float[Tensor, "b 3 h w"]:
    """Draw a token's share of every patch, scaled to its own minimum and maximum, as colors over the gray picture.

    Args:
        pictures: (B, 3, H, W).
        shares: The token's share of every patch (B, patches).
        grid: Height and width of the grid of patches.
        together: Number of consecutive pictures, those that a token spans, that are scaled by common limits.
    """
    clips = shares.unflatten(0, (-1, together))
    low, high = clips.amin(dim=(1, 2), keepdim=True), clips.amax(dim=(1, 2), keepdim=True)
    # The lower bound of the range keeps a constant map constant: scaling would show its rounding errors.
    scaled = (clips - low) / (high - low).clamp_min(1e-3 * high.clamp_min(1e-12))
    size = (pictures.shape[2], pictures.shape[3])
    fine = F.interpolate(scaled.reshape(-1, 1, *grid), size=size, mode="bilinear")[:, 0]
    colors = torch.from_numpy(colormaps["inferno"](fine.numpy())[..., :3]).float().permute(0, 3, 1, 2)
    return 0.3 * pictures.mean(dim=1, keepdim=True) + 0.7 * colors


def covered(
    pictures: Float[Tensor, "b 3 h w"], kept: Bool[Tensor, "b patches"], grid: tuple[int, int]
) -> Float[Tensor, "b 3 h w"]:
    """Cover all patches of the pictures that are not kept."""
    shown = _enlarge(kept.int(), grid, pictures).bool()
    return torch.where(shown, pictures, 0.15 * pictures + 0.85 * torch.tensor(COVER).view(3, 1, 1))


def colored(
    pictures: Float[Tensor, "b 3 h w"], groups: Int[Tensor, "b patches"], grid: tuple[int, int]
) -> Float[Tensor, "b 3 h w"]:
    """Color every group of several patches, and draw lines around it."""
    several = (groups[:, :, None] == groups[:, None, :]).sum(dim=2) > 1
    steps = np.arange(int(groups.max()) + 1)
    # The golden ratio spreads any number of hues evenly. A fixed list of colors would repeat.
    hues = np.stack([steps * 0.618034 % 1, 0.5 + steps % 3 * 0.2, 0.75 + steps % 2 * 0.25], axis=1)
    palette = torch.from_numpy(hsv_to_rgb(hues)).float()
    labels, merged = (_enlarge(values, grid, pictures)[:, 0] for values in (groups, several.int()))
    colors = palette[labels].permute(0, 3, 1, 2)
    tinted = torch.where(merged[:, None].bool(), 0.35 * pictures + 0.65 * colors, pictures)
    edge = torch.zeros_like(labels, dtype=torch.bool)
    edge[:, 1:] |= (labels[:, 1:] != labels[:, :-1]) & (merged[:, 1:] + merged[:, :-1] > 0)
    edge[:, :, 1:] |= (labels[:, :, 1:] != labels[:, :, :-1]) & (merged[:, :, 1:] + merged[:, :, :-1] > 0)
    return torch.where(edge[:, None], torch.ones(()), tinted)


def draw(columns: Sequence[Column], labels: Sequence[str] = ()) -> Figure:
    """Return a figure with one row per image. It does not use pyplot, which keeps every figure open.

    Args:
        columns: The columns from left to right.
        labels: A label to the left of every row, or none.
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
    for index, column in enumerate(columns):
        axes[0, index].set_title(column.title, fontsize=7, pad=3)
        for row, (picture, note) in enumerate(zip(column.pictures, column.notes, strict=True)):
            _draw_cell(axes[row, index], picture, note)
    return figure


def _draw_cell(axis: Axes, picture: Float[Tensor, "3 h w"], note: str) -> None:
    axis.imshow(picture.clamp(0, 1).permute(1, 2, 0).numpy())
    axis.set_axis_off()
    if note:
        axis.text(0.97, 0.04, note, transform=axis.transAxes, ha="right", fontsize=6, color="white", bbox=BADGE)


def pixels(figure: Figure) -> UInt8[np.ndarray, "height width 3"]:
    """Return the figure as an array of pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def write_png(figure: Figure, path: Path) -> None:
    """Write the figure as a png file, completely or not at all. Its folder is created if necessary.

    Raises:
        FewtokensError: The file cannot be written.
    """
    with replace_file(path, "wb") as file:
        FigureCanvasAgg(figure).print_png(file)


def _enlarge(
    values: Int[Tensor, "b patches"], grid: tuple[int, int], pictures: Float[Tensor, "b 3 h w"]
) -> Int[Tensor, "b 1 h w"]:
    maps = values.reshape(-1, 1, *grid)
    down = torch.arange(pictures.shape[2]) * grid[0] // pictures.shape[2]
    across = torch.arange(pictures.shape[3]) * grid[1] // pictures.shape[3]
    return maps[:, :, down][:, :, :, across]
