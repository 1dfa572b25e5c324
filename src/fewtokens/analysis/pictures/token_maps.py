"""Pictures of the tokens of test images, drawn from `Tokens.origin` in the same way for all methods.

Every image is a row. A clip has a row for every time step, and pictures of its own in `token_video`. The origin
(B, tokens, patches) alone determines what the columns show:

- Selection, if every patch belongs to at most one token and every token has one patch: dropped patches are covered.
- Merging, if every patch belongs to at most one token: groups of several patches are colored.
- Mixing of many patches in each token: a heat map for every token or, if there are many tokens, groups of the patches
  that have their largest share in the same token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from textwrap import wrap
from typing import Literal

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from fewtokens.analysis.evaluation import class_names, evaluating_eagerly, load_test_samples, unwrap_compiled
from fewtokens.analysis.flops import mean_tokens
from fewtokens.analysis.pictures.drawing import CELL, DROPPED, displayed, heat, merged, without_dropped
from fewtokens.analysis.pictures.sheet import Column, Key, draw, save_png
from fewtokens.backbones.vit import ViT
from fewtokens.errors import check
from fewtokens.tokens import Tokens

Kind = Literal["selection", "groups", "shares", "maps"]
NAME_WIDTH = 18  # characters of a line beside a row; a class name takes up to two lines


@dataclass(frozen=True)
class TokenPicture:
    """The tokens of some images or clips, as pictures.

    Args:
        columns: The images or frames first, then a column for each token, or for each stage. There is a row for every
            image, or for every time step of every clip.
        labels: The label and the prediction of every image or clip; empty if they are unknown.
        steps: Number of time steps of a clip, 1 for images.
        marks: What the colors mean.
        content: A sentence about the columns after the first.
    """

    columns: list[Column]
    labels: list[str]
    steps: int
    marks: list[Key]
    content: str

    @property
    def row_labels(self) -> list[str]:
        """Return a label for every row. That of a clip is at its first time step."""
        if self.steps == 1:
            return self.labels
        return [
            f"{label}\nstep 1".lstrip() if step == 0 else f"step {step + 1}"
            for label in self.labels
            for step in range(self.steps)
        ]

    @property
    def caption(self) -> str:
        """Return the label and the prediction of every image or clip in a line; nothing if they are unknown."""
        lines = [label.replace("\nprediction:", ", prediction:").replace("\n", " ") for label in self.labels if label]
        return " | ".join(lines)

    @property
    def legend(self) -> list[Key]:
        """Return what rows, columns and colors mean."""
        row = "an image" if self.steps == 1 else "a time step of a clip"
        known = ", with its label and the prediction" if any(self.labels) else ""
        return [Key(f"A row is {row}{known}. {self.content}"), *self.marks]


class TokenMaps:
    """The measure that draws the tokens of test images. It returns no numbers.

    After a call, `picture` is the file that was drawn, or None if no tokenizer reduced anything, and `caption` has the
    labels and predictions.

    Args:
        num_images: Number of rows: test images, or time steps of the first clips (at least one clip).
        max_columns: Largest number of tokens, or of stages of a method that acts in many blocks, evenly spaced.

    Raises:
        FewtokensError: A setting is out of range.
    """

    def __init__(self, num_images: int = 8, max_columns: int = 16) -> None:
        check(num_images >= 1, "measure.token_maps.num_images", "an int >= 1", num_images)
        check(max_columns >= 1, "measure.token_maps.max_columns", "an int >= 1", max_columns)
        self.num_images, self.max_columns = num_images, max_columns
        self.picture: Path | None = None
        self.caption = ""

    def __call__(self, task: L.LightningModule, datamodule: L.LightningDataModule, run_dir: Path) -> dict[str, float]:
        """Write `run_dir/pictures/token_maps.png`.

        Args:
            task: The tokens of its `.model` are drawn.
            datamodule: Set up for testing. Its `class_names`, if it has them, name the classes.
            run_dir: Folder of the run; created if it does not exist.
        """
        self.picture = None
        model = unwrap_compiled(task.model)
        images, targets = load_test_samples(task, datamodule, self.num_images)
        found = token_picture(model, images, self.max_columns, self.num_images, targets, datamodule)
        if found:
            self.picture, self.caption = run_dir / "pictures" / "token_maps.png", found.caption
            save_png(draw(found.columns, found.row_labels, found.legend), self.picture)
        return {}


def token_picture(
    model: ViT,
    images: Float[Tensor, "b c *t h w"],
    most: int = 16,
    rows: int | None = None,
    targets: Shaped[Tensor, "b *k"] | None = None,
    datamodule: L.LightningDataModule | None = None,
    width: int = CELL,
) -> TokenPicture | None:
    """Return the tokens of images or clips as pictures, or None if no tokenizer reduced anything.

    Args:
        model: A ViT or ViViT.
        images: Images or clips, as the model gets them.
        most: Largest number of columns after the first.
        rows: Largest number of rows; the number of clips is reduced to keep to it, but at least one clip is drawn. None
            for all.
        targets: Class numbers (B,), for the label and the prediction of every image; None, or several labels per image
            (B, classes), for no labels.
        datamodule: Its `class_names`, if it has them, name the classes.
        width: Width of every picture in pixels.
    """
    images = images if rows is None else images[: max(1, rows // len(model.pictures(images[:1])))]
    with evaluating_eagerly(model):
        start, trace = model.embed(images), model.trace(images)
    blocks = reducing_blocks([start, *trace])
    if not blocks or start.grid is None:
        return None
    frames = model.pictures(images)
    steps = len(frames) // len(images)
    labels = [""] * len(images)
    if targets is not None and targets.ndim == 1:
        with evaluating_eagerly(model):
            logits = model.classify(trace[-1])
        labels = _labels(targets[: len(images)], logits, class_names(datamodule, logits.shape[1]))
    first = Column("image" if images.ndim == 4 else "frame", displayed(frames, steps, width), [""] * len(frames))
    columns, kinds, dropped = _token_columns(first.pictures, start, trace, blocks, most)
    if kinds == {"maps"}:
        content = "A column is one token that the model makes of all patches: where it looks."
    else:
        content = "A column is a stage: the tokens that are left after this block."
    return TokenPicture([first, *columns], labels, steps, marks(kinds, dropped), content)


def _token_columns(
    pictures: Float[Tensor, "b 3 h w"], start: Tokens, trace: Sequence[Tokens], blocks: Sequence[int], most: int
) -> tuple[list[Column], set[Kind], bool]:
    """Return the columns, how they are drawn, and whether patches are missing in any of them."""
    assert start.grid is not None
    tokens = trace[blocks[0]]
    first = origin_by_step(tokens, start.frames)
    if kind_of(first, most) == "maps":
        together = 1 if tokens.frames == start.frames else len(pictures) // len(tokens.x)  # pictures that a token spans
        titles = [f"token {number}" for number in range(1, first.shape[1] + 1)]
        titles[0] = f"block {blocks[0]}\n{titles[0]}"
        columns = [
            Column(title, heat(pictures, shares, start.grid, together), [""] * len(pictures))
            for title, shares in zip(titles, first.unbind(1), strict=True)
        ]
        return columns, {"maps"}, False
    if len(blocks) > most:
        blocks = [blocks[i] for i in np.linspace(0, len(blocks) - 1, most).round().astype(int)]
    origins = {block: origin_by_step(trace[block], start.frames) for block in blocks}
    columns = [_stage_column(block, origin, pictures, start.grid) for block, origin in origins.items()]
    dropped = any(bool((origin.amax(dim=1) == 0).any()) for origin in origins.values())
    return columns, {kind_of(origin, 0) for origin in origins.values()}, dropped


def origin_by_step(tokens: Tokens, steps: int) -> Float[Tensor, "bt n patches"]:
    """Return each token's shares of the patches of every time step (B*T, tokens, H*W).

    If the tokens are laid out in time steps, those of a step are returned for that step; otherwise all tokens are.
    """
    assert tokens.origin is not None
    origin = tokens.origin.float().cpu().unflatten(2, (steps, -1))
    if tokens.frames == steps:
        return origin.unflatten(1, (steps, -1)).diagonal(dim1=1, dim2=3).movedim(-1, 1).flatten(0, 1)
    return origin.movedim(2, 1).flatten(0, 1)


def reducing_blocks(records: Sequence[Tokens]) -> list[int]:
    """Return the blocks that have fewer tokens after them than before, from the records before and after all blocks."""
    counts = [mean_tokens(tokens) - tokens.prefix for tokens in records]
    return [block for block, (before, after) in enumerate(pairwise(counts)) if after < before]


def kind_of(origin: Float[Tensor, "b n patches"], few: int) -> Kind:
    """Return how to draw tokens of this origin. Up to `few` overlapping tokens get a heat map each."""
    held = origin > 1e-6 * origin.amax(dim=(1, 2), keepdim=True)
    if (held.sum(dim=1) <= 1).all():
        return "selection" if (held.sum(dim=2) <= 1).all() else "groups"
    return "maps" if origin.shape[1] <= few else "shares"


def stage(
    pictures: Float[Tensor, "b 3 h w"], origin: Float[Tensor, "b n patches"], grid: tuple[int, int], few: int = 0
) -> Float[Tensor, "b 3 h w"]:
    """Draw what a stage has left: groups of merged patches, kept patches as they are, and dropped ones faded.

    Args:
        pictures: (B, 3, H, W).
        origin: Share of every patch in every token (B, tokens, patches).
        grid: Height and width of the grid of patches.
        few: Up to so many tokens that each mix many patches get a small heat map each, see `mosaic`.
    """
    kind = kind_of(origin, few)
    if kind == "maps":
        return mosaic(pictures, origin, grid)
    drawn = pictures if kind == "selection" else merged(pictures, origin.argmax(dim=1), grid)
    return without_dropped(drawn, origin.amax(dim=1) > 0, grid)


def mosaic(
    pictures: Float[Tensor, "b 3 h w"], origin: Float[Tensor, "b n patches"], grid: tuple[int, int]
) -> Float[Tensor, "b 3 h w"]:
    """Draw a few tokens that each mix many patches: a small heat map for each of them, on white. See `stage`."""
    height, width = pictures.shape[2:]
    columns = math.ceil(math.sqrt(origin.shape[1]))
    size = ((height - columns + 1) // columns, (width - columns + 1) // columns)  # with a line of a pixel in between
    small, drawn = F.interpolate(pictures, size, mode="area"), torch.ones_like(pictures)
    for number, shares in enumerate(origin.unbind(1)):
        y, x = number // columns * (size[0] + 1), number % columns * (size[1] + 1)
        drawn[:, :, y : y + size[0], x : x + size[1]] = heat(small, shares, grid)
    return drawn


def count_tokens(origin: Float[Tensor, "b n patches"]) -> list[int]:
    """Return the number of tokens of every picture, without padding, whose origin is zero."""
    return (origin.amax(dim=2) > 0).sum(dim=1).tolist()


def _stage_column(
    block: int, origin: Float[Tensor, "b n patches"], pictures: Float[Tensor, "b 3 h w"], grid: tuple[int, int]
) -> Column:
    counts = count_tokens(origin)
    low, high = min(counts), max(counts)
    title = f"block {block}\n{low if low == high else f'{low}-{high}'} tokens"
    notes = [""] * len(counts) if low == high else [str(count) for count in counts]
    return Column(title, stage(pictures, origin, grid), notes)


def _labels(targets: Int[Tensor, " b"], logits: Float[Tensor, "b classes"], names: Sequence[str]) -> list[str]:
    def lines(what: str, name: str) -> str:
        return "\n".join(wrap(f"{what}: {name}", NAME_WIDTH, max_lines=2, placeholder="…"))

    predicted = logits.argmax(dim=1).tolist()
    return [
        lines("label", names[true]) + "\n" + lines("prediction", names[guess] + ("" if true == guess else " ✗"))
        for true, guess in zip(targets.tolist(), predicted, strict=True)
    ]


def marks(kinds: set[Kind], dropped: bool) -> list[Key]:
    """Return the legend of the colors."""
    example = merged(torch.full((1, 3, 20, 50), 0.55), torch.tensor([[0, 0, 1, 1, 1]]), (1, 5))[0]
    same = ": their mean color, with a line around them; all other patches show the image"
    marks = {
        "maps": Key(
            "share of each patch in the token, from the least to the most; each picture has its own scale",
            heat(torch.full((1, 3, 20, 160), 0.6), torch.linspace(0, 1, 16)[None], (1, 16))[0],
        ),
        "groups": Key(f"patches that were merged into one token{same}", example),
        "shares": Key(f"patches that have their largest share in the same token{same}", example),
        "selection": None,
    }
    keys = [key for kind, key in marks.items() if kind in kinds and key is not None]
    if dropped:
        keys.append(
            Key("dropped patches; kept patches show the image", torch.tensor(DROPPED).view(3, 1, 1).expand(3, 20, 20))
        )
    return keys
