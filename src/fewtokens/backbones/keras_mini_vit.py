"""The mini ViT of the Keras TokenLearner example (2021), as its code computes it.

It differs from an ordinary ViT: every head is as wide as the model (4 heads of 128), GELU follows both MLP layers,
dropout acts on the attention weights and the MLP but not on the attention's output, the positions are random and not
trained, kernels are Glorot-uniform with Keras's definition of fans, there is no class token, and the final norm comes
before the mean pooling.
"""

from functools import partial
from itertools import chain
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fewtokens.backbones.vit import TokenizerRecipe, ViT, check_sizes, load_weights
from fewtokens.errors import check
from fewtokens.layers.attention import Attention
from fewtokens.layers.block import Block
from fewtokens.layers.embedding import Size, pair
from fewtokens.tokenizers.token_learner import MapPooler


class KerasMlp(Mlp):
    """An MLP with GELU after both layers: Dense, GELU, dropout, Dense, GELU, dropout."""

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """Map (B, N, C) to (B, N, C)."""
        return self.drop2(self.act(self.fc2(self.drop1(self.act(self.fc1(x))))))


class KerasBlock(Block):
    """A block with a given width of its heads and without dropout on the attention's output."""

    def __init__(self, key_dim: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.attn = Attention(
            settings["dim"],
            settings["num_heads"],
            attn_head_dim=key_dim,
            qkv_bias=True,
            attn_drop=settings["attn_drop"],
        )


def keras_mini_vit(
    *,
    image_size: Size,
    patch_size: Size,
    num_classes: int,
    tokenizer: TokenizerRecipe,
    dim: int = 128,
    depth: int = 4,
    heads: int = 4,
    key_dim: int = 128,
    channels: int = 3,
    dropout: float = 0.1,
    weights: str | None = None,
    grad_checkpointing: bool = False,
) -> ViT:
    """Build the example's `create_vit_classifier`, without its augmentation.

    The example places TokenLearner after block i, which is before block i + 1 here: tokenizer.at=3 for 4 blocks and 5
    for 8.

    Args:
        image_size: Height and width in pixels (example: 48).
        patch_size: Height and width of a patch in pixels (example: 6).
        num_classes: Number of outputs.
        tokenizer: The blocks that get a tokenizer, and its recipe.
        dim: Width of the tokens; the MLP is twice as wide.
        depth: Number of blocks.
        heads: Number of attention heads.
        key_dim: Width of each head.
        channels: Number of image channels.
        dropout: Dropout rate of positions, attention weights and MLP.
        weights: "keras:<file>" to start from weights of the example, see `fewtokens.backbones.converters`.
        grad_checkpointing: Recompute the activations of every layer in the backward pass, which saves memory.
    """
    check_sizes(image_size, patch_size, dim, heads, depth)
    check(channels >= 1, "data.channels", "an int >= 1", channels)
    check(key_dim >= 1, "backbone.key_dim", "an int >= 1", key_dim)
    check(0 <= dropout < 1, "backbone.dropout", "a share in [0, 1)", dropout)
    timm_model = VisionTransformer(
        img_size=pair(image_size),
        patch_size=pair(patch_size),
        in_chans=channels,
        num_classes=num_classes,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        mlp_ratio=2.0,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
        pos_drop_rate=dropout,
        proj_drop_rate=dropout,
        attn_drop_rate=dropout,
        block_fn=partial(KerasBlock, key_dim=key_dim),  # type: ignore[arg-type]  # timm calls it as a class
        mlp_layer=KerasMlp,
        attn_layer=Attention,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    model = ViT(timm_model, tokenizer)
    model.set_grad_checkpointing(grad_checkpointing)
    init_as_keras(model, heads)
    assert timm_model.pos_embed is not None
    timm_model.pos_embed.requires_grad_(False)  # in the example the positions are a constant of the graph
    load_weights(model, weights)
    return model


@torch.no_grad()
def init_as_keras(model: ViT, heads: int) -> None:
    """Initialize as Keras does: Glorot-uniform kernels, zero biases, positions uniform in +-0.05.

    Of the tokenizers, only TokenLearner is part of the example. Others keep their own initialization, such as a
    TokenFuser that starts at zero.
    """
    learners = [module for module in model.encoder.modules() if isinstance(module, MapPooler)]
    for module in chain.from_iterable(part.modules() for part in (model.vit, *model.encoder.blocks, *learners)):
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            # torch stores (out, in / groups, *window), Keras (*window, in / groups, out).
            out, into, *window = module.weight.shape
            _glorot_(module.weight, (*window, into, out))
    for block in model.encoder.blocks:
        # In Keras's MultiHeadAttention the heads have an axis, which its fans count as part of the window.
        dim, key_dim = block.attn.qkv.in_features, block.attn.head_dim
        _glorot_(block.attn.qkv.weight, (dim, heads, key_dim))
        _glorot_(block.attn.proj.weight, (heads, key_dim, dim))
    assert model.vit.pos_embed is not None
    nn.init.uniform_(model.vit.pos_embed, -0.05, 0.05)


def _glorot_(weight: Tensor, keras_shape: tuple[int, ...]) -> None:
    window = prod(keras_shape[:-2])
    bound = (6 / (window * (keras_shape[-2] + keras_shape[-1]))) ** 0.5
    nn.init.uniform_(weight, -bound, bound)
