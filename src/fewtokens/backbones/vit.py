"""ViT: timm's VisionTransformer with our blocks and a tokenizer."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, TypedDict

import torch
from jaxtyping import Float
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fewtokens.backbones.encoder import At, Build, Encoder
from fewtokens.backbones.trunk import check_sizes, make_trunk
from fewtokens.errors import FewtokensError
from fewtokens.layers.embedding import Size, pair
from fewtokens.tokenizers.base import Place
from fewtokens.tokens import Tokens


class TokenizerRecipe(TypedDict):
    """A tokenizer config: where it stands and how it is built."""

    at: At
    build: Build


class ViT(nn.Module):
    """A Vision Transformer whose tokens a tokenizer learns, samples or merges.

    timm's model does the embedding, the norms and the head; the encoder between them is ours. With the plain
    tokenizer the logits are timm's, bit for bit. Names of parameters are timm's, with `trunk.` or `encoder.` ahead.

    Args:
        trunk: timm's model, built with `block_fn=Block, attn_layer=Attention`. Its blocks move to the encoder.
        tokenizer: Where the tokenizer stands and its recipe.
        frames: Time steps in which the patches are laid out; an image is a clip of one.
    """

    def __init__(self, trunk: VisionTransformer, tokenizer: TokenizerRecipe, frames: int = 1) -> None:
        super().__init__()
        blocks: list[Any] = list(trunk.blocks)
        trunk.blocks = nn.Sequential()
        self.trunk, self.frames = trunk, frames
        place = Place(
            dim=trunk.embed_dim,
            heads=blocks[0].attn.num_heads,
            block=0,
            depth=len(blocks),
            prefix=trunk.num_prefix_tokens,
            class_token=trunk.has_class_token,
            frames=frames,
            grid=tuple(trunk.patch_embed.grid_size),
        )
        self.encoder = Encoder(blocks, tokenizer["build"], tokenizer["at"], place)

    def forward(self, images: Float[Tensor, "b c *t h w"]) -> Float[Tensor, "b classes"]:
        """Images (B, channels, H, W), normalised as the data says, to logits (B, classes)."""
        return self.classify(self.encoder(self.embed(images)))

    def embed(self, images: Float[Tensor, "b c *t h w"], trace: bool = False) -> Tokens:
        """Patches with positions, class and register tokens.

        Args:
            images: (B, channels, H, W).
            trace: Keep the origin of every token and the record after every block.

        Raises:
            FewtokensError: The images are not of the size that the model was built for.
        """
        trunk = self.trunk
        self._check_shape(images)
        x = trunk.patch_embed(images)
        grid = tuple(x.shape[1:3]) if trunk.dynamic_img_size else tuple(trunk.patch_embed.grid_size)
        x = trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(x)))
        prefix = trunk.num_prefix_tokens
        dropped = x.shape[1] - prefix < self.frames * grid[0] * grid[1]
        tokens = Tokens(x, prefix) if dropped else Tokens(x, prefix, self.frames, grid)
        return traced(tokens) if trace else tokens

    def classify(self, tokens: Tokens) -> Float[Tensor, "b classes"]:
        """Final norm, pooling and head (B, classes)."""
        trunk = self.trunk
        tokens = tokens.update(trunk.norm(tokens.x))
        if tokens.uniform or isinstance(trunk, VisionTransformerDistilled) or trunk.global_pool == "token":
            return trunk.forward_head(tokens.x)
        return trunk.head(trunk.head_drop(trunk.fc_norm(self._pool(tokens))))

    def trace(self, images: Float[Tensor, "b c *t h w"]) -> list[Tokens]:
        """The tokens after every block, with the origin of each: one record per block, for pictures and counts."""
        tokens = self.embed(images, trace=True)
        self.encoder(tokens)
        assert tokens.trace is not None
        return tokens.trace

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample: channels, frames if it is a clip, height, width."""
        return (self.trunk.in_chans, *self.trunk.patch_embed.img_size)

    def pictures(self, images: Float[Tensor, "b c *t h w"]) -> Float[Tensor, "bt c h w"]:
        """What every time step shows (B*T, channels, H, W), for pictures of the tokens."""
        return images

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay leaves alone: positions, class and register tokens."""
        return {f"trunk.{name}" for name in self.trunk.no_weight_decay()}

    def _pool(self, tokens: Tokens) -> Float[Tensor, "b c"]:
        """timm's pooling where sizes count and padding does not."""
        trunk = self.trunk
        if trunk.pool_include_prefix:
            tokens = replace(tokens, prefix=0)
        if trunk.global_pool == "avg":
            return tokens.mean()
        tokens = tokens.decided()
        if trunk.attn_pool is not None:
            bias = tokens.bias()
            return trunk.attn_pool(tokens.patches, attn_mask=None if bias is None else bias[..., tokens.prefix :])
        patches = tokens.patches
        if tokens.mask is not None:
            patches = patches.masked_fill(~tokens.mask[:, tokens.prefix :, None], float("-inf"))
        highest = patches.amax(dim=1)
        return highest if trunk.global_pool == "max" else 0.5 * (highest + tokens.mean())

    def _check_shape(self, images: Tensor) -> None:
        trunk, embed = self.trunk, self.trunk.patch_embed
        fits = images.ndim == 4 and images.shape[1] == trunk.in_chans
        sides: list[object] = list(embed.img_size)
        if trunk.dynamic_img_size:
            steps = (1, 1) if embed.dynamic_img_pad else embed.patch_size
            sides = [f"a multiple of {step}" for step in steps]
            fits = fits and all(side % step == 0 for side, step in zip(images.shape[2:], steps, strict=True))
        else:
            fits = fits and list(images.shape[2:]) == sides
        if not fits:
            raise FewtokensError(
                "A ViT takes images of the size that it was built for",
                expected=f"(batch, channels, height, width) = (B, {trunk.in_chans}, {sides[0]}, {sides[1]})",
                got=tuple(images.shape),
                fix="set data.image_size and data.channels to what the data gives",
            )


def traced(tokens: Tokens) -> Tokens:
    """The record with the origin of every patch token and a list for the records after every block."""
    eye = torch.eye(tokens.num_patches, device=tokens.x.device).expand(tokens.x.shape[0], -1, -1)
    return replace(tokens, origin=eye, trace=[])


def vit(
    *,
    image_size: Size,
    patch_size: Size,
    num_classes: int,
    tokenizer: TokenizerRecipe,
    dim: int,
    depth: int,
    heads: int,
    channels: int = 3,
    pool: Literal["token", "avg", "max", "avgmax", "map"] = "token",
    options: Mapping[str, Any] | None = None,
) -> ViT:
    """A ViT of any size, from random weights.

    Args:
        image_size: Height and width, or one number for both.
        patch_size: The same for a patch; must divide the image.
        num_classes: Outputs.
        tokenizer: Where the tokenizer stands and its recipe.
        dim: Width of the tokens.
        depth: Blocks.
        heads: Attention heads; must divide the width.
        channels: Image channels.
        pool: What the head reads: the class token, or the patches by one of timm's poolings (no class token then).
        options: Any other argument of timm's VisionTransformer: mlp_ratio, drop_path_rate, init_values, class_token ...

    Raises:
        FewtokensError: Sizes that do not fit, or an unknown option.
    """
    check_sizes(image_size, patch_size, dim, heads, depth)
    settings = {"class_token": pool == "token", "global_pool": pool, **(options or {})}
    trunk = make_trunk(
        settings,
        img_size=pair(image_size),
        patch_size=pair(patch_size),
        in_chans=channels,
        num_classes=num_classes,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
    )
    return ViT(trunk, tokenizer)
