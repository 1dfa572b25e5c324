"""A picture of where tokens look: one row per test image, drawn from `Tokens.origin` and thus the same for all methods.

A clip has a row for every time step, and pictures of its own in `token_video`. What a column shows is decided by the
origin (B, tokens, patches) alone:

- every patch belongs to one token at most, every token has one patch: selection; what was dropped is covered;
- every patch belongs to one token at most: merging; groups of several patches are coloured;
- a few tokens of many patches each: one heat map per token; where they are many: groups by the largest share.
"""

from itertools import pairwise
from pathlib import Path
from typing import Literal

import lightning as L
import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import Tensor

from fewtokens.analysis.cost import evaluating, plain, test_images
from fewtokens.analysis.pictures.drawing import Column, coloured, covered, displayed, draw, heat
from fewtokens.backbones.vit import ViT
from fewtokens.tokens import Tokens

Kind = Literal["selection", "groups", "maps"]


class TokenMaps:
    """The measure that draws; it has no numbers. `picture` is the file of the last call, None if nothing was reduced.

    Args:
        num_images: Rows: the first test images, or the time steps of the first clips (one clip at least).
        max_columns: At most so many tokens, or stages of a method that acts in many blocks, evenly spread.
    """

    def __init__(self, num_images: int = 8, max_columns: int = 16) -> None:
        self.num_images, self.max_columns = num_images, max_columns
        self.picture: Path | None = None

    def __call__(self, task: L.LightningModule, datamodule: L.LightningDataModule, run_dir: Path) -> dict[str, float]:
        """Writes `run_dir/pictures/token_maps.png`.

        Args:
            task: Its `.model` is looked at.
            datamodule: Set up for testing.
            run_dir: Made if there is none.
        """
        self.picture = None
        model, images = plain(task.model), test_images(task, datamodule, self.num_images)
        columns = token_columns(model, images, self.max_columns, self.num_images)
        if columns:
            path = run_dir / "pictures" / "token_maps.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            FigureCanvasAgg(draw(columns)).print_png(path)
            self.picture = path
        return {}


def token_columns(
    model: ViT, images: Float[Tensor, "b c *t h w"], most: int = 16, rows: int | None = None
) -> list[Column]:
    """The columns of the picture, the images themselves first; none where no tokenizer reduced anything.

    Args:
        model: Any ViT or ViViT.
        images: As the model gets them.
        most: Columns after the first, at most.
        rows: At most so many, if need be of the first clips alone, one clip at least; None for all.
    """
    images = images if rows is None else images[: max(1, rows // len(model.pictures(images[:1])))]
    with evaluating(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        start, trace = model.embed(images), model.trace(images)
    blocks = reducing_blocks([start, *trace])
    if not blocks or start.grid is None:
        return []
    shown = model.pictures(images)
    steps = len(shown) // len(images)
    pictures = displayed(shown, steps)
    columns = [Column("image" if images.ndim == 4 else "frame", pictures, [""] * len(pictures))]
    first = origin_by_step(trace[blocks[0]], start.frames)
    of_clip = steps if trace[blocks[0]].frames != start.frames else 1  # pictures that a token spans
    if kind_of(first, most) == "maps":
        covers = first.unbind(1)
        titles = [f"token {number}" for number in range(1, len(covers) + 1)]
        titles[0] = f"block {blocks[0]}\n{titles[0]}"
        return columns + [
            Column(title, heat(pictures, shares, start.grid, of_clip), [""] * len(pictures))
            for title, shares in zip(titles, covers, strict=True)
        ]
    if len(blocks) > most:
        blocks = [blocks[i] for i in np.linspace(0, len(blocks) - 1, most).round().astype(int)]
    origins = {block: origin_by_step(trace[block], start.frames) for block in blocks}
    return columns + [_stage(block, origin, pictures, start.grid) for block, origin in origins.items()]


def origin_by_step(tokens: Tokens, steps: int) -> Float[Tensor, "bt n patches"]:
    """What is held of every time step (B*T, tokens, H*W): by its own tokens, or by all where they belong to no step."""
    assert tokens.origin is not None
    origin = tokens.origin.float().cpu().unflatten(2, (steps, -1))
    if tokens.frames == steps:
        return origin.unflatten(1, (steps, -1)).diagonal(dim1=1, dim2=3).movedim(-1, 1).flatten(0, 1)
    return origin.movedim(2, 1).flatten(0, 1)


def reducing_blocks(records: list[Tokens]) -> list[int]:
    """Blocks that have fewer tokens after them than before; `records` are those before and after every block."""
    counts = [_alive(tokens).sum(dim=1).float().mean().item() for tokens in records]
    return [block for block, (before, after) in enumerate(pairwise(counts)) if after < before]


def kind_of(origin: Float[Tensor, "b n patches"], few: int) -> Kind:
    """How to draw tokens of this origin; up to `few` that overlap get a map each."""
    held = origin > 1e-6 * origin.amax(dim=(1, 2), keepdim=True)
    if (held.sum(dim=1) <= 1).all():
        return "selection" if (held.sum(dim=2) <= 1).all() else "groups"
    return "maps" if origin.shape[1] <= few else "groups"


def _stage(
    block: int, origin: Float[Tensor, "b n patches"], pictures: Float[Tensor, "b 3 h w"], grid: tuple[int, int]
) -> Column:
    counts = (origin.amax(dim=2) > 0).sum(dim=1).tolist()  # padding holds nothing
    present = origin.amax(dim=1) > 0
    if kind_of(origin, 0) == "selection":
        drawn = covered(pictures, present, grid)
    else:
        drawn = covered(coloured(pictures, origin.argmax(dim=1), grid), present, grid)
    same = min(counts) == max(counts)
    title = f"block {block}\n" + (f"{counts[0]} tokens" if same else f"{min(counts)} to {max(counts)} tokens")
    return Column(title, drawn, [""] * len(counts) if same else [str(count) for count in counts])


def _alive(tokens: Tokens) -> Bool[Tensor, "b n"]:
    whole = tokens.x.new_ones(tokens.x.shape[:2], dtype=torch.bool) if tokens.mask is None else tokens.mask
    return whole[:, tokens.prefix :]
