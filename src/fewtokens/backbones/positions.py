"""Tables of positions: an image model's, spread over the time steps of a video model."""

from collections.abc import Mapping
from math import isqrt
from typing import Literal

import torch
from jaxtyping import Float
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from fewtokens.backbones.vivit import ViViT
from fewtokens.errors import FewtokensError

How = Literal["tile", "resize"]
TABLE = "trunk.pos_embed"


def spread(image: Mapping[str, Tensor], model: ViViT, how: How, grid: tuple[int, int] | None) -> Float[Tensor, "1 n d"]:
    """The video model's table: the image's, resampled where asked for, at every time step.

    Positions of class and register tokens are copied as far as both models have them.

    Args:
        image: Weights of the image model, under our names.
        model: The video model.
        how: "tile" or "resize", timm's bicubic resampling first.
        grid: Of the image model; None where it is the video's or square.

    Raises:
        FewtokensError: The grids differ and are not to be resampled, the image's is unknown, or class tokens have a
            position in one model only.
    """
    trunk, table, wanted = model.trunk, image[TABLE], model.tubelets.grid
    tokens = [f"trunk.{name}_token" for name in ("cls", "dist", "reg")]
    ahead = sum(image[name].shape[1] for name in tokens if name in image)
    grid, rows = grid_of(table.shape[1], ahead, wanted, grid)
    if how not in ("tile", "resize") or (how == "tile" and grid != wanted):
        raise FewtokensError(
            "Positions are tiled over time, after resampling where the grids differ",
            expected=f"positions 'tile' with a grid of {wanted}, or 'resize' with any",
            got=f"{how!r} with a grid of {grid}",
            fix="set init_image.positions=resize",
        )
    own = model.state_dict()[TABLE]
    lead = 0 if trunk.no_embed_class else trunk.num_prefix_tokens
    start, both = own[:, :lead].clone(), "trunk.cls_token" in image and trunk.has_class_token
    if both and bool(lead) != bool(rows):
        raise FewtokensError(
            "A class token has a position in both models or in neither",
            expected=f"an image model {'with' if lead else 'without'} one",
            got=f"a table of {table.shape[1]} rows for a grid of {grid}",
            fix=f"set backbone.options.no_embed_class={str(bool(lead)).lower()}, or init_image.grid=[height,width]",
        )
    if both:
        count = rows if rows == lead else 1
        start[:, :count] = table[:, :count]
    patches = resample_abs_pos_embed(table[:, rows:], list(wanted), list(grid), num_prefix_tokens=0)
    steps = (own.shape[1] - lead) // patches.shape[1]
    return torch.cat([start, patches.repeat(1, steps, 1).to(start)], dim=1)


def grid_of(
    rows: int, ahead: int, wanted: tuple[int, int], grid: tuple[int, int] | None
) -> tuple[tuple[int, int], int]:
    """The grid of an image model's table, and how many rows of class and register tokens lie ahead of it.

    Raises:
        FewtokensError: It is not the one given, nor the video's, nor square.
    """
    for lead in (ahead, 0):
        side = isqrt(max(rows - lead, 0))
        for candidate in [wanted, (side, side)] if grid is None else [grid]:
            if candidate[0] * candidate[1] == rows - lead > 0:
                return candidate, lead
    raise FewtokensError(
        "The image model's positions lie on a grid",
        expected=f"{rows - ahead} patches on a grid of {grid or wanted}, or a square one",
        got=f"a table of {rows} rows, of which {ahead} are of class or register tokens",
        fix="set init_image.grid=[height,width], in patches of the image model",
    )
