"""Pictures of the tokens of test images, drawn from `Tokens.origin` in the same way for all methods.

Every image is a row. A clip has a row for every time step, and pictures of its own in `token_video`. The origin
(B, tokens, patches) alone determines what the columns show:

- Selection, if every patch belongs to at most one token and every token has one patch: dropped patches are covered.
- Merging, if every patch belongs to at most one token: groups of several patches are colored.
- Mixing of many patches in each token: a heat map for every token or, if there are many tokens, groups of the patches
  that have their largest share in the same token.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

import lightning as L
import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from fewtokens.analysis.evaluation import class_names, evaluating_eagerly, load_test_samples, unwrap_compiled
from fewtokens.analysis.flops import mean_tokens
from fewtokens.analysis.pictures.drawing import Column, colored, covered, displayed, draw, heat, write_png
from fewtokens.backbones.vit import ViT
from fewtokens.tokens import Tokens

Kind = Literal["selection", "groups", "maps"]
NAME_LENGTH = 15  # characters of a class name that fit into a picture


class TokenMaps:
    """The measure that draws the tokens of test images. It returns no numbers.

    After a call, `picture` is the file that was drawn, or None if no tokenizer reduced anything.

    Args:
        num_images: Number of rows: test images, or time steps of the first clips (at least one clip).
        max_columns: Largest number of tokens, or of stages of a method that acts in many blocks, evenly spaced.
    """

    def __init__(self, num_images: int = 8, max_columns: int = 16) -> None:
        self.num_images, self.max_columns = num_images, max_columns
        self.picture: Path | None = None

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
        columns = token_columns(model, images, self.max_columns, self.num_images, targets, datamodule)
        if columns:
            self.picture = run_dir / "pictures" / "token_maps.png"
            write_png(draw(columns), self.picture)
        return {}


def token_columns(
    model: ViT,
    images: Float[Tensor, "b c *t h w"],
    most: int = 16,
    rows: int | None = None,
    targets: Int[Tensor, "b *k"] | None = None,
    datamodule: L.LightningDataModule | None = None,
) -> list[Column]:
    """Return the columns of the picture, with the images themselves first, or none if no tokenizer reduced anything.

    Args:
        model: A ViT or ViViT.
        images: Images or clips, as the model gets them.
        most: Largest number of columns after the first.
        rows: Largest number of rows; the number of clips is reduced to keep to it, but at least one clip is drawn. None
            for all.
        targets: Class numbers (B,), to note the label and the prediction of every image in the first column; None, or
            several labels per image (B, classes), for no notes.
        datamodule: Its `class_names`, if it has them, name the classes.
    """
    images = images if rows is None else images[: max(1, rows // len(model.pictures(images[:1])))]
    with evaluating_eagerly(model):
        start, trace = model.embed(images), model.trace(images)
    blocks = reducing_blocks([start, *trace])
    if not blocks or start.grid is None:
        return []
    frames = model.pictures(images)
    steps = len(frames) // len(images)
    notes = [""] * len(images)
    if targets is not None and targets.ndim == 1:
        with evaluating_eagerly(model):
            logits = model.classify(trace[-1])
        notes = _label_notes(targets[: len(images)], logits, class_names(datamodule, logits.shape[1]))
    title = "image" if images.ndim == 4 else "frame"
    column = Column(title, displayed(frames, steps), [note for note in notes for _ in range(steps)])
    return [column, *_map_columns(column.pictures, start, trace, blocks, most)]


def _map_columns(
    pictures: Float[Tensor, "b 3 h w"], start: Tokens, trace: Sequence[Tokens], blocks: Sequence[int], most: int
) -> list[Column]:
    assert start.grid is not None
    tokens = trace[blocks[0]]
    first = origin_by_step(tokens, start.frames)
    if kind_of(first, most) == "maps":
        together = 1 if tokens.frames == start.frames else len(pictures) // len(tokens.x)  # pictures that a token spans
        titles = [f"token {number}" for number in range(1, first.shape[1] + 1)]
        titles[0] = f"block {blocks[0]}\n{titles[0]}"
        return [
            Column(title, heat(pictures, shares, start.grid, together), [""] * len(pictures))
            for title, shares in zip(titles, first.unbind(1), strict=True)
        ]
    if len(blocks) > most:
        blocks = [blocks[i] for i in np.linspace(0, len(blocks) - 1, most).round().astype(int)]
    origins = {block: origin_by_step(trace[block], start.frames) for block in blocks}
    return [_stage_column(block, origin, pictures, start.grid) for block, origin in origins.items()]


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
    return "maps" if origin.shape[1] <= few else "groups"


def _stage_column(
    block: int, origin: Float[Tensor, "b n patches"], pictures: Float[Tensor, "b 3 h w"], grid: tuple[int, int]
) -> Column:
    counts = (origin.amax(dim=2) > 0).sum(dim=1).tolist()  # the origin of padding is zero
    kept = origin.amax(dim=1) > 0
    if kind_of(origin, 0) == "selection":
        drawn = covered(pictures, kept, grid)
    else:
        drawn = covered(colored(pictures, origin.argmax(dim=1), grid), kept, grid)
    same = min(counts) == max(counts)
    title = f"block {block}\n" + (f"{counts[0]} tokens" if same else f"{min(counts)} to {max(counts)} tokens")
    return Column(title, drawn, [""] * len(counts) if same else [str(count) for count in counts])


def _label_notes(targets: Int[Tensor, " b"], logits: Float[Tensor, "b classes"], names: Sequence[str]) -> list[str]:
    short = [name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 1]}…" for name in names]
    predicted = logits.argmax(dim=1).tolist()
    return [f"true: {short[a]}\npred: {short[b]}" for a, b in zip(targets.tolist(), predicted, strict=True)]
