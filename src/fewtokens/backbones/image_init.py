"""A video model that starts from an image model: Arnab et al., "ViViT", ICCV 2021, section 3.4.

Three defects of the official code are not here. Where a model starts from random weights, scenic puts the central frame
on the axis of width; model 2 loses the class token; model 3's temporal attention may start with zeros in all four
matrices, of which then only the last bias can ever learn.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewtokens.backbones.positions import TABLE, How, spread
from fewtokens.backbones.pretrained import read_weights, timm_vit
from fewtokens.backbones.vivit import PLAIN, FactorisedEncoder, ViViT
from fewtokens.errors import FewtokensError
from fewtokens.layers.factorised import SelfAttentionBlock

log = logging.getLogger(__name__)
Kernel = Literal["central_frame", "filter_inflation"]
State = dict[str, Tensor]
TIMM = "timm:"
PROJECTION, HEAD = "trunk.patch_embed.proj.weight", "trunk.head."
# What an image model may have and a video model not, or the other way round
OF_TRUNK = ("cls_token", "reg_token", "dist_token", "head", "attn_pool.")
OPTIONAL = (*(f"trunk.{name}" for name in OF_TRUNK), "temporal.", "encoder.tokenizers.")
TWINS = {".norm1.": ".norm_time.", ".attn.": ".attn_time.", ".ls1.": ".ls_time."}


@dataclass(frozen=True)
class Started:
    """What came of an initialisation.

    Args:
        loaded: Names in the video model that got weights.
        missing: Names in the video model that the image model has nothing for, and that keep their random start.
        unexpected: Names in the image model that the video model has no place for.
    """

    loaded: list[str]
    missing: list[str]
    unexpected: list[str]

    def __str__(self) -> str:
        missing, unexpected = ", ".join(self.missing) or "none", ", ".join(self.unexpected) or "none"
        return f"{len(self.loaded)} tensors from the image model; start anew: {missing}; not used: {unexpected}"


class FromImage:
    """The recipe `init_image` of a run: the video model starts from an image model that lies in a file.

    Args:
        weights: A run of an image ViT (its directory or a checkpoint), a file of weights in timm's names, or
            "timm:<name>", which timm fetches and resamples to the video's frames.
        kernel: See `from_image_model`.
        positions: See `from_image_model`.
        grid: See `from_image_model`.
    """

    def __init__(
        self,
        weights: str,
        kernel: Kernel = "central_frame",
        positions: How = "tile",
        grid: tuple[int, int] | list[int] | None = None,
    ) -> None:
        self.weights, self.kernel, self.positions = weights, kernel, positions
        self.grid = None if grid is None else (int(grid[0]), int(grid[1]))

    def __call__(self, model: nn.Module) -> Started:
        """Start the model so, and say what was loaded.

        Raises:
            FewtokensError: It is no video model, or the weights do not fit it.
        """
        if not isinstance(model, ViViT):
            raise FewtokensError(
                "init_image starts a video model",
                expected="a vivit_* backbone",
                got=type(model).__name__,
                fix="set backbone=vivit_base, or init_image=none",
            )
        started = from_image_model(model, self._read(model), self.kernel, self.positions, self.grid)
        log.info("%s: %s", self.weights, started)
        return started

    def _read(self, model: ViViT) -> Mapping[str, Tensor]:
        if self.weights.startswith(TIMM):
            name, sides = self.weights.removeprefix(TIMM), model.tubelets.sides
            return timm_vit(name=name, image_size=sides, num_classes=0, tokenizer=PLAIN, pretrained=True).state_dict()
        path = Path(self.weights)
        candidates = [path] if path.is_file() else [path / "checkpoints" / name for name in ("best.ckpt", "last.ckpt")]
        for candidate in candidates:
            if candidate.is_file():
                return read_weights(candidate)
        raise FewtokensError(
            "init_image.weights names an image model",
            expected="a run directory with checkpoints, a file of weights, or timm:<name>",
            got=self.weights,
            fix="set init_image.weights=outputs/<name>/<time>",
        )


@torch.no_grad()
def from_image_model(
    model: ViViT,
    state: Mapping[str, Tensor],
    kernel: Kernel = "central_frame",
    positions: How = "tile",
    grid: tuple[int, int] | None = None,
) -> Started:
    """Give a video model the weights of an image model of the same width, depth and patch size.

    What starts as the image model, exactly: models 3 and 2 with `temporal_depth` 0, pooled by the mean (2: in any way),
    give the mean of the image model's logits over the central frames; model 1 with mean pooling its logits for a clip
    that stands still, with a class token only if the clip is one time step (patches that repeat outweigh the class
    token in its own attention). Not so: model 4, half of whose heads now see one position only, and model 2's temporal
    encoder, which starts at random, as officially.

    Args:
        model: Changed in place, and only if everything fits.
        state: In our names (a run of ours, with `model.` ahead or not) or timm's.
        kernel: "central_frame": the image kernel at time t // 2 of the tubelet, zeros elsewhere; "filter_inflation":
            the image kernel divided by t at every time.
        positions: "tile": the image's table for every time step; "resize": the same after timm's bicubic resampling to
            the video's grid.
        grid: Patches (H, W) of the image model; None where they are the video's, or square.

    Returns:
        What was loaded; heads of another size, class and register tokens, tokenizers and temporal encoders that only
        one of the two has are named and no error.

    Raises:
        FewtokensError: Anything else does not fit.
    """
    image, own = image_state(state), model.state_dict()
    found = dict(image)
    _rename(found, own, isinstance(model, FactorisedEncoder))
    if PROJECTION in found:
        found[PROJECTION] = inflated(found[PROJECTION], model.tubelets.frames, kernel)
    if TABLE in found and TABLE in own and found[TABLE].shape[-1] == own[TABLE].shape[-1]:
        found[TABLE] = spread(found, model, positions, grid)
    for index, block in enumerate(model.encoder.blocks):
        if isinstance(block, SelfAttentionBlock):
            found |= twins(found, f"encoder.blocks.{index}")
    soft = [k for k in found if k.startswith(OPTIONAL) and k in own and own[k].shape != found[k].shape]
    unexpected = sorted(set(found) - set(own) | set(soft))
    missing = sorted(set(own) - set(found) | set(soft))
    loaded = {name: value for name, value in found.items() if name not in unexpected}
    _check(missing, unexpected, [k for k, v in loaded.items() if own[k].shape != v.shape])
    model.load_state_dict(loaded, strict=False)
    return Started(sorted(loaded), missing, unexpected)


def image_state(state: Mapping[str, Tensor]) -> State:
    """Weights of an image model under our names, from a checkpoint of ours, a model of ours, or timm's names."""
    named = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
    if any(name.startswith(("model.trunk.", "model.encoder.")) for name in named):  # beside it lie metrics
        named = {k.removeprefix("model."): v for k, v in named.items() if k.startswith("model.")}
    if any(name.startswith("trunk.") for name in named):
        return named
    return {f"{'encoder' if name.startswith('blocks.') else 'trunk'}.{name}": v for name, v in named.items()}


def inflated(kernel: Float[Tensor, "d c *t h w"], frames: int, how: Kernel) -> Float[Tensor, "d c t h w"]:
    """An image kernel as that of a tubelet of so many frames.

    Raises:
        FewtokensError: It is no image kernel, or there is no such way.
    """
    if kernel.ndim != 4 or how not in ("central_frame", "filter_inflation"):
        raise FewtokensError(
            "The kernel of an image model is inflated in one of two ways",
            expected="(width, channels, height, height) and 'central_frame' or 'filter_inflation'",
            got=f"{tuple(kernel.shape)} and {how!r}",
            fix="give an image model's weights; a video model is continued with resume=<run>",
        )
    if how == "filter_inflation":
        return (kernel / frames)[:, :, None].expand(-1, -1, frames, -1, -1)
    whole = kernel.new_zeros(*kernel.shape[:2], frames, *kernel.shape[2:])
    whole[:, :, frames // 2] = kernel
    return whole


def twins(found: State, block: str) -> State:
    """Model 3's temporal attention and norm, copied from the spatial ones of a block, so that it adds nothing at first.

    Only the output projection is zero: gradients reach it at once, and through it, from the second step on, the rest.
    """
    copies = {}
    for name, value in found.items():
        if name.startswith(f"{block}."):
            for part, twin in TWINS.items():
                if part in name:
                    output = name.endswith((".attn.proj.weight", ".attn.proj.bias"))
                    copies[name.replace(part, twin)] = torch.zeros_like(value) if output else value
    return copies


def _rename(found: State, own: State, factorised: bool) -> None:
    """Names that differ between image and video models: the side of the pooling that the norm is on; model 2's head."""
    for name in ("trunk.norm.", "trunk.fc_norm."):
        other = "trunk.fc_norm." if name == "trunk.norm." else "trunk.norm."
        for part in ("weight", "bias"):
            if name + part in found and name + part not in own and other + part in own:
                found[other + part] = found.pop(name + part)
    for part in ("weight", "bias"):
        if factorised and HEAD + part in found and HEAD + part not in own:
            found[f"temporal.{HEAD}{part}"] = found.pop(HEAD + part)


def _check(missing: list[str], unexpected: list[str], wrong: list[str]) -> None:
    lost = [name for name in missing if not name.startswith(OPTIONAL)]
    strange = [name for name in unexpected if not name.startswith(OPTIONAL)]
    if lost or strange or wrong:
        raise FewtokensError(
            "A video model starts from an image model of the same width, depth, patch size and options",
            expected="weights for all of its blocks, its embedding and its norm",
            got=f"missing {lost[:4]}, unexpected {strange[:4]}, of another shape {wrong[:4]} "
            f"({len(lost)}, {len(strange)} and {len(wrong)} in all)",
            fix="choose the backbone, its tubelets and its options after the image model",
        )
