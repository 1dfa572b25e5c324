"""The mini ViT of the Keras TokenLearner example (2021), as its code really is.

Differences from an ordinary ViT: heads as wide as the model (inner width 4 x 128), GELU after both MLP layers, dropout
on attention and MLP but not on the attention's output, a random position table that is never learned, Glorot-uniform
kernels with Keras's notion of fans, no class token, norm before mean pooling.
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

from fewtokens.backbones.trunk import check_sizes
from fewtokens.backbones.vit import TokenizerRecipe, ViT
from fewtokens.layers.attention import Attention
from fewtokens.layers.block import Block
from fewtokens.layers.embedding import Size, pair
from fewtokens.tokenizers.token_learner import MapPooler


class KerasMlp(Mlp):
    """Dense, GELU, dropout, Dense, GELU again, dropout."""

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """(B, N, C) to (B, N, C)."""
        return self.drop2(self.act(self.fc2(self.drop1(self.act(self.fc1(x))))))


class KerasBlock(Block):
    """A block whose heads have a width of their own, without dropout on the attention's output."""

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
) -> ViT:
    """The example's `create_vit_classifier`, without its augmentation.

    Its "after block i" is our "before block i + 1": tokenizer.at=3 for 4 blocks, 5 for 8.

    Args:
        image_size: Height and width (example: 48).
        patch_size: (example: 6).
        num_classes: Outputs.
        tokenizer: Where the tokenizer stands and its recipe.
        dim: Width of the tokens; the MLP is twice as wide.
        depth: Blocks.
        heads: Attention heads.
        key_dim: Width of each head.
        channels: Image channels.
        dropout: Rate everywhere.
    """
    check_sizes(image_size, patch_size, dim, heads, depth)
    trunk = VisionTransformer(
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
    model = ViT(trunk, tokenizer)
    init_as_keras(model, heads)
    assert trunk.pos_embed is not None
    trunk.pos_embed.requires_grad_(False)  # the example's table is a constant of the graph
    return model


@torch.no_grad()
def init_as_keras(model: ViT, heads: int) -> None:
    """Glorot-uniform kernels, zero biases, positions uniform in +-0.05 (Embedding's default).

    Of the tokenizers only TokenLearner is the example's; the others, a fuser that starts at zero say, keep their start.
    """
    learners = [module for module in model.encoder.tokenizers.modules() if isinstance(module, MapPooler)]
    for module in chain.from_iterable(part.modules() for part in (model.trunk, model.encoder.blocks, *learners)):
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            nn.init.zeros_(module.bias) if module.bias is not None else None
            # torch has (out, in / groups, *window), Keras (*window, in / groups, out)
            out, into, *window = module.weight.shape
            _glorot_(module.weight, (*window, into, out))
    blocks: list[Any] = list(model.encoder.blocks)
    for block in blocks:
        # MultiHeadAttention keeps heads on an axis of their own, which its fans take for a part of the window
        dim, key_dim = block.attn.qkv.in_features, block.attn.head_dim
        _glorot_(block.attn.qkv.weight, (dim, heads, key_dim))
        _glorot_(block.attn.proj.weight, (heads, key_dim, dim))
    assert model.trunk.pos_embed is not None
    nn.init.uniform_(model.trunk.pos_embed, -0.05, 0.05)


def _glorot_(weight: Tensor, keras_shape: tuple[int, ...]) -> None:
    window = prod(keras_shape[:-2])
    bound = (6 / (window * (keras_shape[-2] + keras_shape[-1]))) ** 0.5
    nn.init.uniform_(weight, -bound, bound)
