"""The trunk: timm's VisionTransformer with our blocks, and the sizes that it can have."""

from collections.abc import Mapping
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from fewtokens.errors import FewtokensError
from fewtokens.layers.attention import Attention
from fewtokens.layers.block import Block
from fewtokens.layers.embedding import Size, pair


def make_trunk(options: Mapping[str, Any], **settings: Any) -> VisionTransformer:
    """timm's VisionTransformer with our blocks.

    Raises:
        FewtokensError: timm does not take the options.
    """
    try:
        return VisionTransformer(**{"block_fn": Block, "attn_layer": Attention} | settings, **options)
    except (TypeError, ValueError, KeyError, AssertionError) as error:  # timm has no exception of its own
        if isinstance(error, FewtokensError):
            raise
        raise FewtokensError(
            "backbone.options are arguments of timm's VisionTransformer",
            expected="names and values that it takes",
            got=f"{dict(options)}: {error}",
            fix="see help(timm.models.vision_transformer.VisionTransformer)",
        ) from error


def check_sizes(image_size: Size, patch_size: Size, dim: int, heads: int, depth: int) -> None:
    """Refuse sizes that do not fit each other.

    Raises:
        FewtokensError: The patch does not divide the image, the heads do not divide the width, or nothing is left.
    """
    image, patch = pair(image_size), pair(patch_size)
    if min(patch) < 1 or any(i < p or i % p for i, p in zip(image, patch, strict=True)):
        raise FewtokensError(
            "Patches tile the image",
            expected=f"a patch size that divides {image[0]}x{image[1]}",
            got=f"{patch[0]}x{patch[1]}",
            fix="set backbone.patch_size, or resize the data with data.image_size",
        )
    check_heads(dim, heads, depth)


def check_heads(dim: int, heads: int, depth: int) -> None:
    """Refuse a width that the heads cannot share, and a model of nothing.

    Raises:
        FewtokensError: It is so.
    """
    if heads < 1 or dim < 1 or dim % heads:
        raise FewtokensError(
            "The heads share the width among them",
            expected=f"a number of heads that divides {dim}",
            got=heads,
            fix="set backbone.heads or backbone.dim",
        )
    if depth < 1:
        raise FewtokensError("A ViT has blocks", expected="backbone.depth >= 1", got=depth, fix="set backbone.depth=4")
