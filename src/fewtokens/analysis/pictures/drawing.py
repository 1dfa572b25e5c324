"""Pictures with maps on top of them: heat maps, dropped patches, and groups of merged patches."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from fewtokens.files import replace_file

CELL = 128  # width of a picture in pixels, unless a caller wants another
DROPPED = (0.86, 0.83, 0.95)  # color of dropped patches: neither black, gray nor white, which are frequent in pictures


def displayed(
    images: Float[Tensor, "b c h w"], together: int = 1, width: int = CELL, stretch: bool = True
) -> Float[Tensor, "b 3 h2 w2"]:
    """Return images of any number of channels as RGB pictures from 0 to 1, scaled to a width.

    Args:
        images: (B, C, H, W).
        together: Number of consecutive images, the frames of a clip, that are stretched by common limits.
        width: Width of the pictures in pixels. Small images are enlarged with square pixels.
        stretch: Stretch every image, or every clip, to the range from 0 to 1, which makes normalized images visible.
            False for images that are in this range already.
    """
    images = images.float().cpu()
    if images.shape[1] != 3:
        images = images.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    if stretch:
        clips = images.unflatten(0, (-1, together))
        clips = clips - clips.amin(dim=(1, 2, 3, 4), keepdim=True)
        images = (clips / clips.amax(dim=(1, 2, 3, 4), keepdim=True).clamp_min(1e-6)).flatten(0, 1)
    size = (max(1, round(width * images.shape[2] / images.shape[3])), width)
    if images.shape[3] < width:
        images = F.interpolate(images, scale_factor=-(-width // images.shape[3]), mode="nearest")
    if tuple(images.shape[2:]) != size:
        images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
    return images.clamp(0, 1)


def heat(
    pictures: Float[Tensor, "b 3 h w"], shares: Float[Tensor, "b patches"], grid: tuple[int, int], together: int = 1
) -> Float[Tensor, "b 3 h w"]:
    """Draw a token's share of every patch, scaled to its own minimum and maximum, as colors over the gray picture.

    Where the share is least, the dimmed picture is visible; where it is most, the color is.

    Args:
        pictures: (B, 3, H, W).
        shares: The token's share of every patch (B, patches).
        grid: Height and width of the grid of patches.
        together: Number of consecutive pictures, those that a token spans, that are scaled by common limits.
    """
    clips = shares.unflatten(0, (-1, together))
    low, high = clips.amin(dim=(1, 2), keepdim=True), clips.amax(dim=(1, 2), keepdim=True)
    # The lower bound of the range keeps a constant map constant: scaling would show its rounding errors.
    scaled = ((clips - low) / (high - low).clamp_min(1e-3 * high.clamp_min(1e-12))).clamp(0, 1)
    size = (pictures.shape[2], pictures.shape[3])
    fine = F.interpolate(scaled.reshape(-1, 1, *grid), size=size, mode="bilinear")
    colors = (
        torch.from_numpy(colormaps["inferno"](0.25 + 0.57 * fine[:, 0].numpy())[..., :3]).float().permute(0, 3, 1, 2)
    )
    gray = pictures.mean(dim=1, keepdim=True)
    strength = 0.95 * fine**1.5  # so that what is looked at most stands out
    # The picture also sets the brightness of the colors, so that it stays visible below them.
    return (1 - strength) * 0.65 * gray + strength * colors * (0.66 + 0.34 * gray)


def without_dropped(
    pictures: Float[Tensor, "b 3 h w"], kept: Bool[Tensor, "b patches"], grid: tuple[int, int]
) -> Float[Tensor, "b 3 h w"]:
    """Fade all patches of the pictures that are not kept."""
    shown = _enlarge(kept.int(), grid, pictures).bool()
    return torch.where(shown, pictures, 0.08 * pictures + 0.92 * torch.tensor(DROPPED).view(3, 1, 1))


def merged(
    pictures: Float[Tensor, "b 3 h w"], groups: Int[Tensor, "b patches"], grid: tuple[int, int]
) -> Float[Tensor, "b 3 h w"]:
    """Fill every group of several patches with its mean color, and draw a line in the color of the group around it."""
    several = (groups[:, :, None] == groups[:, None, :]).sum(dim=2) > 1
    labels, filled = (_enlarge(values, grid, pictures)[:, 0] for values in (groups, several.int()))
    colors = palette(int(groups.max()) + 1)[labels].permute(0, 3, 1, 2)
    means = torch.where(filled[:, None].bool(), _group_means(pictures, labels), pictures)
    return torch.where((_edges(labels) & filled.bool())[:, None], colors, means)


def palette(count: int) -> Float[Tensor, "count 3"]:
    """Return bright colors that differ from each other, as many as there are groups."""
    steps = np.arange(count)
    # The golden ratio spreads any number of hues evenly. A fixed list of colors would repeat.
    hues = np.stack([steps * 0.618034 % 1, 0.6 + steps % 3 * 0.2, 0.8 + steps % 2 * 0.2], axis=1)
    return torch.from_numpy(hsv_to_rgb(hues)).float()


def write_png(figure: Figure, path: Path) -> None:
    """Write the figure as a png file, completely or not at all. Its folder is created if necessary.

    Raises:
        FewtokensError: The file cannot be written.
    """
    with replace_file(path, "wb") as file:
        FigureCanvasAgg(figure).print_png(file)


def _group_means(pictures: Float[Tensor, "b 3 h w"], labels: Int[Tensor, "b h w"]) -> Float[Tensor, "b 3 h w"]:
    """Return the mean color of every pixel's group."""
    index = labels.flatten(1)[:, None].expand(-1, 3, -1)
    sums = torch.zeros(len(pictures), 3, int(labels.max()) + 1)
    totals = sums.scatter_add(2, index, pictures.flatten(2))
    counts = sums.scatter_add(2, index, torch.ones_like(index, dtype=totals.dtype)).clamp_min(1)
    return (totals / counts).gather(2, index).view_as(pictures)


def _edges(labels: Int[Tensor, "b h w"]) -> Bool[Tensor, "b h w"]:
    """Return the pixels inside of each group that are next to another one, or at the edge of the picture."""
    padded = F.pad(labels, (1, 1, 1, 1), value=-1)
    inner = padded[:, 1:-1, 1:-1]
    edges = torch.zeros_like(labels, dtype=torch.bool)
    for down, across in ((0, 1), (2, 1), (1, 0), (1, 2)):
        edges |= inner != padded[:, down : down + labels.shape[1], across : across + labels.shape[2]]
    return edges


def _enlarge(
    values: Int[Tensor, "b patches"], grid: tuple[int, int], pictures: Float[Tensor, "b 3 h w"]
) -> Int[Tensor, "b 1 h w"]:
    maps = values.reshape(-1, 1, *grid)
    down = torch.arange(pictures.shape[2]) * grid[0] // pictures.shape[2]
    across = torch.arange(pictures.shape[3]) * grid[1] // pictures.shape[3]
    return maps[:, :, down][:, :, :, across]
