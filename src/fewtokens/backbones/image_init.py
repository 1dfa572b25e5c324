"""Initialization of a video model from an image model: Arnab et al., "ViViT", ICCV 2021, section 3.4.

Three defects of the official code are avoided. With random weights, scenic puts the central frame on the axis of width;
model 2 loses the class token; and the temporal attention of model 3 may start with zeros in all four matrices, of which
only the last bias can then ever learn.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from fewtokens.backbones.pretrained import read_weights, timm_vit
from fewtokens.backbones.vivit import PLAIN, FactorisedEncoder, ViViT
from fewtokens.errors import FewtokensError, check_choice
from fewtokens.files import checkpoint_in
from fewtokens.layers.factorised import SelfAttentionBlock

log = logging.getLogger(__name__)
Kernel = Literal["central_frame", "filter_inflation"]
Positions = Literal["tile", "resize"]
State = dict[str, Tensor]
TIMM = "timm:"
POSITIONS, PROJECTION, HEAD = "vit.pos_embed", "vit.patch_embed.proj.weight", "vit.head."
# Parameters that only one of the two models may have
OPTIONAL_IN_VIT = ("cls_token", "reg_token", "dist_token", "head", "attn_pool.")
OPTIONAL = (*(f"vit.{name}" for name in OPTIONAL_IN_VIT), "temporal.")
TEMPORAL_COPIES = {".norm1.": ".norm_time.", ".attn.": ".attn_time.", ".ls1.": ".ls_time."}


@dataclass(frozen=True)
class LoadedWeights:
    """The result of an initialization from an image model.

    Args:
        loaded: Parameters of the video model that were loaded.
        missing: Parameters of the video model that the image model does not have. They keep their random values.
        unexpected: Parameters of the image model that the video model does not have.
    """

    loaded: list[str]
    missing: list[str]
    unexpected: list[str]

    def __str__(self) -> str:
        missing, unexpected = ", ".join(self.missing) or "none", ", ".join(self.unexpected) or "none"
        return f"{len(self.loaded)} tensors loaded from the image model; random: {missing}; unused: {unexpected}"


class FromImage:
    """The recipe `init_image` of a run, which starts the video model from the weights of an image model.

    Args:
        weights: A run of an image ViT (its directory or a checkpoint), a file of weights in timm's names, or
            "timm:<name>", which timm downloads and resamples to the size of the video's frames.
        kernel: See `init_from_image`.
        positions: See `init_from_image`.
        grid: See `init_from_image`.
    """

    def __init__(
        self,
        weights: str,
        kernel: Kernel = "central_frame",
        positions: Positions = "tile",
        grid: tuple[int, int] | list[int] | None = None,
    ) -> None:
        self.weights, self.kernel, self.positions = weights, kernel, positions
        self.grid = None if grid is None else (int(grid[0]), int(grid[1]))

    def __call__(self, model: nn.Module) -> LoadedWeights:
        """Load the weights into the model, and log and return what was loaded.

        Raises:
            FewtokensError: The model is no video model, or the weights do not fit it.
        """
        if not isinstance(model, ViViT):
            raise FewtokensError(
                f"init_image starts a video model, but the backbone is a {type(model).__name__}. "
                "Set backbone=vivit_base, or init_image=none."
            )
        loaded = init_from_image(model, self._read(model), self.kernel, self.positions, self.grid)
        log.info("%s: %s", self.weights, loaded)
        return loaded

    def _read(self, model: ViViT) -> Mapping[str, Tensor]:
        if self.weights.startswith(TIMM):
            name, sides = self.weights.removeprefix(TIMM), model.tubelets.sides
            return timm_vit(name=name, image_size=sides, num_classes=0, tokenizer=PLAIN, pretrained=True).state_dict()
        path = checkpoint_in(Path(self.weights))
        if path is None:
            raise FewtokensError(
                "`init_image.weights` must be a run directory with checkpoints, a file of weights, or timm:<name>, "
                f"got {self.weights!r}."
            )
        return read_weights(path)


@torch.no_grad()
def init_from_image(
    model: ViViT,
    state: Mapping[str, Tensor],
    kernel: Kernel = "central_frame",
    positions: Positions = "tile",
    grid: tuple[int, int] | None = None,
) -> LoadedWeights:
    """Load the weights of an image model of the same width, depth and patch size into a video model.

    Some models then start exactly as the image model. Model 3, and model 2 with `temporal_depth=0`, give the mean of
    the image model's logits over the central frames, if they pool by the mean (model 2: with any pooling). Model 1 with
    mean pooling gives the image model's logits for a clip of identical frames; with a class token it does so only for a
    clip of one time step, since repeated patches outweigh the class token in its own attention. This does not hold for
    model 4, in which half of the heads now see a single position, nor for model 2's temporal encoder, which starts at
    random as in the official code.

    Args:
        model: The video model. It is changed in place, and only if everything fits.
        state: Weights in our names (of a run, with or without the prefix `model.`) or in timm's.
        kernel: "central_frame" puts the image kernel at time t // 2 of the tubelet and zeros elsewhere;
            "filter_inflation" puts the image kernel, divided by t, at every time.
        positions: "tile" repeats the positions of the image model for every time step; "resize" first resamples them to
            the video's grid (bicubic, by timm).
        grid: Grid (H, W) of patches of the image model; None if it is the video's, or square.

    Returns:
        The names of what was loaded and what was not. A head of another size, and class and register tokens and
        temporal encoders that only one of the models has, are listed there and are no error.

    Raises:
        FewtokensError: Anything else does not fit.
    """
    found, own = dict(rename_image_state(state)), model.state_dict()
    _rename_norm_and_head(found, own, isinstance(model, FactorisedEncoder))
    if PROJECTION in found:
        found[PROJECTION] = inflate_kernel(found[PROJECTION], model.tubelets.frames, kernel)
    if POSITIONS in found and POSITIONS in own and found[POSITIONS].shape[-1] == own[POSITIONS].shape[-1]:
        found[POSITIONS] = tile_positions(found, model, positions, grid)
    for index, block in enumerate(model.encoder.blocks):
        if isinstance(block, SelfAttentionBlock):
            found |= temporal_copies(found, f"encoder.layers.{index}.block")
    resized = [k for k in found if _is_optional(k) and k in own and own[k].shape != found[k].shape]
    unexpected = sorted(set(found) - set(own) | set(resized))
    missing = sorted(set(own) - set(found) | set(resized))
    loaded = {name: value for name, value in found.items() if name not in unexpected}
    _check_complete(missing, unexpected, [k for k, v in loaded.items() if own[k].shape != v.shape])
    model.load_state_dict(loaded, strict=False)
    return LoadedWeights(sorted(loaded), missing, unexpected)


def rename_image_state(state: Mapping[str, Tensor]) -> State:
    """Return the weights of an image model in our names, from a checkpoint or model of ours or from timm's names."""
    named = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
    if any(name.startswith(("model.vit.", "model.encoder.")) for name in named):  # a checkpoint also holds metrics
        named = {k.removeprefix("model."): v for k, v in named.items() if k.startswith("model.")}
    if any(name.startswith("vit.") for name in named):
        return named
    renamed = {}
    for name, value in named.items():
        group, _, rest = name.partition(".")
        index, _, parameter = rest.partition(".")
        renamed[f"encoder.layers.{index}.block.{parameter}" if group == "blocks" else f"vit.{name}"] = value
    return renamed


def inflate_kernel(kernel: Float[Tensor, "d c *t h w"], frames: int, how: Kernel) -> Float[Tensor, "d c t h w"]:
    """Return the kernel of an image model as the kernel of tubelets with the given number of frames.

    Raises:
        FewtokensError: It is not the kernel of an image model, or the method is unknown.
    """
    check_choice("init_image.kernel", how, ("central_frame", "filter_inflation"))
    if kernel.ndim != 4:
        raise FewtokensError(
            "`init_image.weights` must be the weights of an image model, with a kernel (width, channels, height, "
            f"width), got {tuple(kernel.shape)}. Continue a video model with resume=<run> or init_from=<run>."
        )
    if how == "filter_inflation":
        return (kernel / frames)[:, :, None].expand(-1, -1, frames, -1, -1)
    inflated = kernel.new_zeros(*kernel.shape[:2], frames, *kernel.shape[2:])
    inflated[:, :, frames // 2] = kernel
    return inflated


def tile_positions(
    image: Mapping[str, Tensor], model: ViViT, how: Positions, grid: tuple[int, int] | None
) -> Float[Tensor, "1 n d"]:
    """Return the positions of the video model: those of the image model, repeated for every time step.

    Positions of class and register tokens are copied as far as both models have them.

    Args:
        image: Weights of the image model, in our names.
        model: The video model.
        how: "tile", or "resize" to resample the positions to the grid of the video first.
        grid: Grid (H, W) of the image model; None if it is the video's, or square.

    Raises:
        FewtokensError: The grids differ and `how` is "tile", the grid of the image model is unknown, or the class token
            has a position in one model only.
    """
    vit, table, target = model.vit, image[POSITIONS], model.tubelets.grid
    check_choice("init_image.positions", how, ("tile", "resize"))
    num_prefix = sum(
        image[name].shape[1] for name in ("vit.cls_token", "vit.dist_token", "vit.reg_token") if name in image
    )
    grid, rows = image_grid(table.shape[1], num_prefix, target, grid)
    if how == "tile" and grid != target:
        raise FewtokensError(
            f"The image model has a grid of {grid[0]}x{grid[1]} patches and the video model one of "
            f"{target[0]}x{target[1]}. Set init_image.positions=resize to resample the positions."
        )
    own = model.state_dict()[POSITIONS]
    own_rows = 0 if vit.no_embed_class else vit.num_prefix_tokens
    prefix, both = own[:, :own_rows].clone(), "vit.cls_token" in image and vit.has_class_token
    if both and bool(own_rows) != bool(rows):
        no_embed_class = str(bool(own_rows)).lower()
        raise FewtokensError(
            f"The class token has a position in only one of the two models: the image model has {table.shape[1]} "
            f"positions for a grid of {grid[0]}x{grid[1]}. Set backbone.options.no_embed_class={no_embed_class}, or "
            "init_image.grid=[height,width] if the grid is another one."
        )
    if both:
        count = rows if rows == own_rows else 1
        prefix[:, :count] = table[:, :count]
    patches = resample_abs_pos_embed(table[:, rows:], list(target), list(grid), num_prefix_tokens=0)
    steps = (own.shape[1] - own_rows) // patches.shape[1]
    return torch.cat([prefix, patches.repeat(1, steps, 1).to(prefix)], dim=1)


def image_grid(
    rows: int, num_prefix: int, target: tuple[int, int], grid: tuple[int, int] | None
) -> tuple[tuple[int, int], int]:
    """Return the grid (H, W) of an image model's positions, and the number of class and register positions before it.

    Raises:
        FewtokensError: The number of positions fits neither the given grid, nor the video's, nor a square.
    """
    for prefix in (num_prefix, 0):
        side = isqrt(max(rows - prefix, 0))
        for candidate in [target, (side, side)] if grid is None else [grid]:
            if candidate[0] * candidate[1] == rows - prefix > 0:
                return candidate, prefix
    tried = f"the grid {list(grid)}" if grid else f"a grid of {list(target)} or a square"
    raise FewtokensError(
        f"The image model has {rows} positions, {num_prefix} of them for class and register tokens, which do not form "
        f"{tried}. Set init_image.grid=[height,width], in patches of the image model."
    )


def temporal_copies(found: State, block: str) -> State:
    """Return the temporal attention and norm of a block of model 3, copied from the spatial ones.

    The output projection is zero, so that temporal attention adds nothing at first. It gets gradients from the first
    step on, and through it the other parameters from the second.
    """
    copies = {}
    for name, value in found.items():
        if name.startswith(f"{block}."):
            for part, temporal in TEMPORAL_COPIES.items():
                if part in name:
                    output = name.endswith((".attn.proj.weight", ".attn.proj.bias"))
                    copies[name.replace(part, temporal)] = torch.zeros_like(value) if output else value
    return copies


def _rename_norm_and_head(found: State, own: State, factorised: bool) -> None:
    """Rename what has other names in video models: the norm before or after the pooling, and the head of model 2."""
    for name in ("vit.norm.", "vit.fc_norm."):
        other = "vit.fc_norm." if name == "vit.norm." else "vit.norm."
        for part in ("weight", "bias"):
            if name + part in found and name + part not in own and other + part in own:
                found[other + part] = found.pop(name + part)
    for part in ("weight", "bias"):
        if factorised and HEAD + part in found and HEAD + part not in own:
            found[f"temporal.{HEAD}{part}"] = found.pop(HEAD + part)


def _is_optional(name: str) -> bool:
    return name.startswith(OPTIONAL) or (name.startswith("encoder.layers.") and ".tokenizer." in name)


def _check_complete(missing: list[str], unexpected: list[str], mismatched: list[str]) -> None:
    required = [name for name in missing if not _is_optional(name)]
    unknown = [name for name in unexpected if not _is_optional(name)]
    if required or unknown or mismatched:
        raise FewtokensError(
            "The image model must have the width, depth, patch size and options of the video model: "
            f"missing {required[:4]}, unexpected {unknown[:4]}, of another shape {mismatched[:4]} ({len(required)}, "
            f"{len(unknown)} and {len(mismatched)} in all). Choose the backbone, its tubelets and options accordingly."
        )
