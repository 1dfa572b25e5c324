"""Vision Transformers: timm's VisionTransformer with our encoder in place of its blocks."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypedDict, get_args

import torch
from jaxtyping import Float
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fewtokens.arguments import argument_types, described, fits
from fewtokens.backbones.encoder import At, Build, Encoder
from fewtokens.errors import FewtokensError, check, check_choice
from fewtokens.layers.attention import Attention
from fewtokens.layers.block import Block
from fewtokens.layers.embedding import Size, pair, sincos_positions
from fewtokens.tokenizers.base import LayerContext, Tokenizer
from fewtokens.tokens import Tokens

Pool = Literal["token", "avg", "max", "avgmax", "map"]
Norm = Literal["before_pool", "after_pool"]
Positions = Literal["learned", "sincos2d"]


class TokenizerRecipe(TypedDict):
    """A tokenizer config: the blocks that get one, and the recipe that builds it."""

    at: At
    build: Build


class ViT(nn.Module):
    """A Vision Transformer with a tokenizer that learns, samples or merges its tokens.

    timm's model does the embedding, the norms and the head; the encoder between them is ours. With the plain tokenizer
    the logits equal timm's bit for bit. Parameters have timm's names below `vit.`, and those of the blocks below
    `encoder.layers.<index>.block.`.

    Args:
        vit: timm's model, built with `block_fn=Block, attn_layer=Attention`. Its blocks are moved to the encoder.
        tokenizer: The blocks that get a tokenizer, and its recipe.
        frames: Number T of time steps in which the patches are laid out, 1 for images.
    """

    def __init__(self, vit: VisionTransformer, tokenizer: TokenizerRecipe, frames: int = 1) -> None:
        super().__init__()
        check_pooling(vit)
        context, blocks = layer_context(vit, frames), list(vit.blocks)
        vit.blocks = nn.Sequential()
        self.vit, self.frames = vit, frames
        self.encoder = Encoder(blocks, tokenizer["build"], tokenizer["at"], context)

    def check_tokenizers(self, tokenizers: Sequence[Tokenizer]) -> None:
        """Raise an error if the model cannot work with some tokenizers. Images work with all of them."""

    def forward(self, images: Float[Tensor, "b c *t h w"]) -> Float[Tensor, "b classes"]:
        """Map normalized images (B, channels, H, W) to logits (B, classes)."""
        return self.classify(self.encoder(self.embed(images)))

    def embed(self, images: Float[Tensor, "b c *t h w"], trace: bool = False) -> Tokens:
        """Return the patches with positions, and the class and register tokens.

        Args:
            images: (B, channels, H, W).
            trace: Record the origin of every token, and the tokens after every block.

        Raises:
            FewtokensError: The images do not have the size that the model was built for.
        """
        vit = self.vit
        self._check_shape(images)
        x = vit.patch_embed(images)
        grid = tuple(x.shape[1:3]) if vit.dynamic_img_size else tuple(vit.patch_embed.grid_size)
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(x)))
        prefix = vit.num_prefix_tokens
        dropped = x.shape[1] - prefix < self.frames * grid[0] * grid[1]
        tokens = Tokens(x, prefix) if dropped else Tokens(x, prefix, self.frames, grid)
        return start_trace(tokens) if trace else tokens

    def classify(self, tokens: Tokens) -> Float[Tensor, "b classes"]:
        """Apply the final norm, the pooling and the head and return logits (B, classes)."""
        vit = self.vit
        tokens = tokens.update(vit.norm(tokens.x))
        if tokens.uniform or isinstance(vit, VisionTransformerDistilled) or vit.global_pool == "token":
            return vit.forward_head(tokens.x)
        return vit.head(vit.head_drop(vit.fc_norm(self._pool(tokens))))

    def trace(self, images: Float[Tensor, "b c *t h w"]) -> list[Tokens]:
        """Return the tokens after every block, with the origin of each token, for pictures and counts."""
        tokens = self.embed(images, trace=True)
        self.encoder(tokens)
        assert tokens.trace is not None
        return tokens.trace

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of every layer in the backward pass instead of storing them."""
        self.encoder.grad_checkpointing = enable

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Return the shape of a sample: channels, frames if it is a clip, height and width."""
        return (self.vit.in_chans, *self.vit.patch_embed.img_size)

    def pictures(self, images: Float[Tensor, "b c *t h w"]) -> Float[Tensor, "bt c h w"]:
        """Return one picture for each time step (B*T, channels, H, W), on which tokens are drawn."""
        return images

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters without weight decay: positions, class and register tokens."""
        return {f"vit.{name}" for name in self.vit.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's description of the layers, from the embedding to the head, for learning-rate decay by layer."""
        stem = str(self.vit.group_matcher()["stem"]).removeprefix("^")
        # The final norm belongs to the last layer. What is named nowhere belongs to the head: fc_norm, attn_pool, and
        # the tokenizers, which are new where the layers are trained, and learn too little at an early layer's rate.
        return {
            "stem": rf"^vit\.(?:{stem})",
            "blocks": [(r"^encoder\.layers\.(\d+)\.block\.", None), (r"^vit\.norm\.", (99999,))],
        }

    def _pool(self, tokens: Tokens) -> Float[Tensor, "b c"]:
        """Apply timm's pooling, weighted by size and without padding."""
        vit = self.vit
        if vit.pool_include_prefix:
            tokens = replace(tokens, prefix=0)
        if vit.global_pool == "avg":
            return tokens.mean()
        tokens = tokens.hardened()
        if vit.attn_pool is not None:
            bias = tokens.bias()
            return vit.attn_pool(tokens.patches, attn_mask=None if bias is None else bias[..., tokens.prefix :])
        patches = tokens.patches
        if tokens.mask is not None:
            patches = patches.masked_fill(~tokens.mask[:, tokens.prefix :, None], float("-inf"))
        highest = patches.amax(dim=1)
        return highest if vit.global_pool == "max" else 0.5 * (highest + tokens.mean())

    def _check_shape(self, images: Tensor) -> None:
        vit, embed = self.vit, self.vit.patch_embed
        sides: list[object] = list(embed.img_size)
        valid = images.ndim == 4 and images.shape[1] == vit.in_chans
        if vit.dynamic_img_size:
            steps = (1, 1) if embed.dynamic_img_pad else embed.patch_size
            sides = [f"a multiple of {step}" for step in steps]
            valid = valid and all(side % step == 0 for side, step in zip(images.shape[2:], steps, strict=True))
        else:
            valid = valid and list(images.shape[2:]) == sides
        if not valid:
            raise FewtokensError(
                f"The model was built for images (batch, channels, height, width) = (B, {vit.in_chans}, {sides[0]}, "
                f"{sides[1]}), got {tuple(images.shape)}. Resize the images, or build the model "
                "for their size (data.image_size, data.channels)."
            )


def layer_context(vit: VisionTransformer, frames: int = 1) -> LayerContext:
    """Return what tokenizers are told about a timm model."""
    blocks: Any = vit.blocks
    return LayerContext(
        dim=vit.embed_dim,
        heads=blocks[0].attn.num_heads,
        block=0,
        depth=len(blocks),
        prefix=vit.num_prefix_tokens,
        class_token=vit.has_class_token,
        frames=frames,
        grid=tuple(vit.patch_embed.grid_size),
    )


def check_pooling(vit: VisionTransformer) -> None:
    """Raise an error if the head needs what reduced tokens do not provide.

    Raises:
        FewtokensError: timm's model returns the logits of every token, or pools in a way that knows no sizes.
    """
    if vit.global_pool not in get_args(Pool):
        raise FewtokensError(
            f"timm's pooling {vit.global_pool!r} cannot be applied to reduced tokens. Use a model with global_pool="
            f"{' or '.join(get_args(Pool))}; with num_classes=0 it returns features instead of logits."
        )


def start_trace(tokens: Tokens) -> Tokens:
    """Return the tokens with the identity as origin, and with an empty trace."""
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
    pool: Pool = "token",
    norm: Norm | None = None,
    positions: Positions = "learned",
    weights: str | None = None,
    grad_checkpointing: bool = False,
    options: Mapping[str, Any] | None = None,
) -> ViT:
    """Build a ViT of any size with random weights.

    Args:
        image_size: Height and width in pixels, or one number for both.
        patch_size: Height and width of a patch in pixels, or one number for both; must divide the image size.
        num_classes: Number of outputs.
        tokenizer: The blocks that get a tokenizer, and its recipe.
        dim: Width C of the tokens.
        depth: Number of blocks.
        heads: Number of attention heads; must divide the width.
        channels: Number of image channels.
        pool: Input of the head: the class token ("token"), or the patches pooled by one of timm's poolings. With the
            latter there is no class token.
        norm: Position of the final norm, "before_pool" or "after_pool". None is timm's default: after the pooling for
            "avg", "max" and "avgmax", before it for "token" and "map".
        positions: "learned", or "sincos2d" for fixed sines and cosines, which need a model without a class token.
        weights: "scenic:<file>" to start from a checkpoint of scenic, see `fewtokens.backbones.converters`.
        grad_checkpointing: Recompute the activations of every layer in the backward pass, which saves memory.
        options: Further arguments of timm's VisionTransformer: mlp_ratio, drop_path_rate, init_values, class_token ...

    Raises:
        FewtokensError: The sizes do not fit together, or timm does not know an option.
    """
    check_sizes(image_size, patch_size, dim, heads, depth)
    timm_model = build_timm(
        pool_settings(pool, norm, options or {}),
        img_size=pair(image_size),
        patch_size=pair(patch_size),
        in_chans=channels,
        num_classes=num_classes,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
    )
    check_choice("backbone.positions", positions, get_args(Positions))
    if positions == "sincos2d":
        check(not timm_model.num_prefix_tokens, "backbone.pool", "avg, max or map with fixed positions", pool)
        table = sincos_positions(tuple(timm_model.patch_embed.grid_size), dim)
        timm_model.pos_embed = nn.Parameter(table.to(timm_model.patch_embed.proj.weight.device), requires_grad=False)
    model = ViT(timm_model, tokenizer)
    model.set_grad_checkpointing(grad_checkpointing)
    load_weights(model, weights)
    return model


def load_weights(model: ViT, weights: str | None) -> None:
    """Load a file of another framework, named as "scenic:<file>", if there is one."""
    if weights is not None:
        from fewtokens.backbones.converters import load_converted  # it imports this module

        load_converted(model, weights)


def pool_settings(pool: str, norm: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with timm's arguments for the pooling and for the position of the final norm.

    Raises:
        FewtokensError: There is no such position, or it is given twice; or an option has a wrong value.
    """
    check_options(options)
    check(norm in (None, *get_args(Norm)), "backbone.norm", "'before_pool', 'after_pool' or null", norm)
    if norm is not None and "fc_norm" in options:
        raise FewtokensError(
            f"backbone.norm={norm} and backbone.options.fc_norm={options['fc_norm']} set the same thing. Set only one."
        )
    position = {} if norm is None else {"fc_norm": norm == "after_pool"}
    return {"class_token": pool == "token", "global_pool": pool, **position, **options}


def build_timm(options: Mapping[str, Any], **settings: Any) -> VisionTransformer:
    """Build timm's VisionTransformer with our blocks.

    Args:
        options: The user's options, named in the error.
        settings: Arguments that the backbone sets.

    Raises:
        FewtokensError: timm does not accept the options.
    """
    check(settings["in_chans"] >= 1, "data.channels", "an int >= 1", settings["in_chans"])
    try:
        return VisionTransformer(**{"block_fn": Block, "attn_layer": Attention} | settings, **options)
    except (TypeError, ValueError, KeyError, AssertionError, RuntimeError) as error:  # timm has no exception of its own
        if isinstance(error, FewtokensError):
            raise
        raise FewtokensError(
            f"`backbone.options` must be arguments of timm's VisionTransformer, got {dict(options)}: {error}. "
            "See help(timm.models.vision_transformer.VisionTransformer)."
        ) from error


def check_options(options: Mapping[str, Any]) -> None:
    """Raise an error for options of timm's VisionTransformer with values of another type or out of range.

    timm checks neither: it takes any text for true.

    Raises:
        FewtokensError: A value is wrong. Names that timm does not know are left to timm.
    """
    types, _ = argument_types(VisionTransformer)
    for name in sorted(types.keys() & options.keys()):
        key, value = f"backbone.options.{name}", options[name]
        number = value if type(value) in (int, float) else -1
        if name == "mlp_ratio":
            check(number > 0, key, "a number > 0", value)
        elif name.endswith("_rate"):
            check(0 <= number < 1, key, "a share in [0, 1)", value)
        else:  # Hydra passes a class or a function as an object, which no plain type describes
            check(callable(value) or fits(value, types[name]), key, described(types[name]), value)


def check_sizes(image_size: Size, patch_size: Size, dim: int, heads: int, depth: int) -> None:
    """Raise an error if the patch does not divide the image, or for `check_heads`.

    Raises:
        FewtokensError: The sizes do not fit together.
    """
    for name, size in (("data.image_size", image_size), ("backbone.patch_size", patch_size)):
        check(isinstance(size, int) or len(size) == 2, name, "an int or [height, width]", size)
    image, patch = pair(image_size), pair(patch_size)
    if min(patch) < 1 or any(i < p or i % p for i, p in zip(image, patch, strict=True)):
        raise FewtokensError(
            f"Patches of {patch[0]}x{patch[1]} pixels do not tile an image of {image[0]}x{image[1]}. "
            "Set backbone.patch_size to a divisor, or resize the data with data.image_size."
        )
    check_heads(dim, heads, depth)


def check_heads(dim: int, heads: int, depth: int) -> None:
    """Raise an error if the heads do not divide the width, or if there is no block.

    Raises:
        FewtokensError: The sizes do not fit together.
    """
    check(dim >= 1, "backbone.dim", "an int >= 1", dim)
    check(heads >= 1 and dim % heads == 0, "backbone.heads", f"a divisor of backbone.dim={dim}", heads)
    check(depth >= 1, "backbone.depth", "an int >= 1", depth)
