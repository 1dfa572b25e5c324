"""The cost of a reduced model and the fate of every patch in it: `fewtokens.cost` and `fewtokens.trace`."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fewtokens.analysis.cost import macs
from fewtokens.analysis.evaluation import evaluating_eagerly
from fewtokens.analysis.flops import GIGA, count
from fewtokens.backbones.vit import ViT
from fewtokens.errors import FewtokensError
from fewtokens.tokenizers.base import Tokenizer
from fewtokens.tokens import Tokens


@dataclass(frozen=True)
class ModelCost:
    """The cost of a model with a method, as means over some images.

    Args:
        gmacs: 1e9 multiply-adds of an image alone, see `fewtokens.analysis.cost.macs`.
        gmacs_dense: The same, of the same weights without the method.
        gmacs_min: Of the image that costs least.
        gmacs_max: Of the image that costs most. Images differ with an adaptive method (ats) only.
        params: Number of parameters, those of the method included.
        params_method: Number of parameters of the method.
        tokens: Tokens before the first block and after every block, class and register tokens included (depth + 1).
    """

    gmacs: float
    gmacs_dense: float
    gmacs_min: float
    gmacs_max: float
    params: int
    params_method: int
    tokens: list[float]

    def __str__(self) -> str:
        spread = "" if self.gmacs_min == self.gmacs_max else f" ({self.gmacs_min:.2f} to {self.gmacs_max:.2f})"
        tokens = " ".join(f"{number:.1f}".removesuffix(".0") for number in self.tokens)
        return (
            f"{self.gmacs:.2f} GMACs per image{spread}, {self.gmacs_dense:.2f} without the method\n"
            f"{self.params:,} parameters, {self.params_method:,} of them of the method\n"
            f"tokens: {tokens}"
        )


@dataclass(frozen=True)
class Stage:
    """The result of a method after one of its blocks.

    A patch is kept if a token holds nothing else, merged if it is a part of a token with others, and dropped if it is
    part of no token. What is dropped may live on in the class token and in other patches, through attention.

    Args:
        block: Index of the block.
        method: Class name of the tokenizer.
        tokens: The tokens after the block, on the model's device; `tokens.origin` holds the share of every patch in
            every token (B, tokens, patches), where patches are numbered row by row.
        grid: Height and width (H, W) of the grid of patches that the model embeds.
    """

    block: int
    method: str
    tokens: Tokens
    grid: tuple[int, int]

    @property
    def num_tokens(self) -> Int[Tensor, " b"]:
        """Return how many patch tokens every image has left (B,), without padding."""
        tokens = self.tokens
        if tokens.mask is None:
            return torch.full((len(tokens.x),), tokens.num_patches, device=tokens.x.device)
        return tokens.mask[:, tokens.prefix :].sum(dim=1)

    @property
    def owner(self) -> Int[Tensor, "b patches"]:
        """Return the patch token that has the largest share of every patch (B, patches); -1 where it was dropped."""
        share, owner = self._origin.max(dim=1)
        return owner.masked_fill(share == 0, -1)

    @property
    def dropped(self) -> Bool[Tensor, "b patches"]:
        """Return whether every patch is part of no token (B, patches)."""
        return (self._origin == 0).all(dim=1)

    @property
    def kept(self) -> Bool[Tensor, "b patches"]:
        """Return whether every patch is the only one in a token (B, patches)."""
        held = self._origin > 0
        alone = held & (held.sum(dim=2, keepdim=True) == 1)
        return alone.any(dim=1)

    @property
    def merged(self) -> Bool[Tensor, "b patches"]:
        """Return whether every patch is part of tokens with others (B, patches)."""
        return ~(self.kept | self.dropped)

    @property
    def _origin(self) -> Float[Tensor, "b n patches"]:
        """Return the shares, without those that are only rounding."""
        origin = self.tokens.origin
        assert origin is not None
        return origin.where(origin > 1e-6 * origin.amax(dim=(1, 2), keepdim=True), 0.0)


def cost(model: nn.Module, images: Float[Tensor, "b c *t h w"]) -> ModelCost:
    """Count what a model with a method computes for some images, and for how many tokens.

    Args:
        model: As `reduce` returned it, also compiled or wrapped in DDP. Its mode does not matter.
        images: Normalized images (B, channels, H, W) on the model's device. Methods other than ats cost the same for
            every image, so that random numbers do as well.

    Raises:
        FewtokensError: The model has no place for a method, or the images have another size than it was built for.
    """
    vit = unwrapped(model)
    _check_images(vit, images)
    counts = count(vit, [images], skip_equal=True)
    with vit.encoder.without_reduction():
        dense = macs(vit, images[:1])
    numbers = counts.macs.double() / GIGA
    method = sum(p.numel() for tokenizer in vit.encoder.tokenizers for p in tokenizer.parameters())
    return ModelCost(
        gmacs=numbers.mean().item(),
        gmacs_dense=dense / GIGA,
        gmacs_min=numbers.min().item(),
        gmacs_max=numbers.max().item(),
        params=sum(p.numel() for p in vit.parameters()),
        params_method=method,
        tokens=counts.tokens.double().mean(dim=0).tolist(),
    )


def trace(model: nn.Module, images: Float[Tensor, "b c *t h w"]) -> list[Stage]:
    """Tell what a method does with the patches of some images, in every block where it acts.

    Args:
        model: See `cost`.
        images: See `cost`.

    Returns:
        One `Stage` for every block that has a tokenizer, in order; none for the plain transformer.

    Raises:
        FewtokensError: See `cost`.
    """
    vit = unwrapped(model)
    _check_images(vit, images)
    with evaluating_eagerly(vit):
        start, records = vit.embed(images), vit.trace(images)
    grid = start.grid or tuple(vit.vit.patch_embed.grid_size)
    return [
        Stage(block, type(tokenizer).__name__, records[block], grid)
        for block, tokenizer in enumerate(vit.encoder.tokenizers)
        if type(tokenizer) is not Tokenizer
    ]


def unwrapped(model: Any) -> ViT:
    """Return the model inside of torch.compile and DistributedDataParallel.

    Raises:
        FewtokensError: It is none that `reduce` has returned, and none of our backbones.
    """
    model = getattr(model, "_orig_mod", model)
    model = getattr(model, "module", model)
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, ViT):
        raise FewtokensError(
            f"`model` must be a model that fewtokens.reduce has returned, got a {type(model).__name__}. For a dense "
            'timm model, call fewtokens.reduce(model, "none") first.'
        )
    return model


def _check_images(model: ViT, images: object) -> None:
    device = next(model.parameters()).device
    if not (isinstance(images, Tensor) and images.is_floating_point() and images.device == device and len(images)):
        got = f"{images.dtype} {tuple(images.shape)} on {images.device}" if isinstance(images, Tensor) else repr(images)
        raise FewtokensError(
            f"`images` must be a tensor of at least one normalized image in floating point on {device}, got {got}."
        )
