"""The cost of the Keras TokenLearner example (2021) in that example's own convention, for comparison with its numbers.

The example prints half of what TensorFlow's profiler (`float_operation`, TF 2.7 to 2.12) finds in the frozen graph of
one image. The profiler counts the operations that are in its registry, and ignores all others:

| operation | FLOPs | part of the graph |
|---|---|---|
| MatMul | 2 m n k | Dense |
| Conv2D | 2 out kh kw in/groups | patches, TokenLearner |
| BiasAdd | 1 per output | Dense and the patch convolution (without bias in TokenLearner) |
| Mul, Sub, RealDiv | 1 per output | see below |
| SquaredDifference, Softmax | 2, 5 per output | LayerNormalization, attention and TokenLearner |
| Mean | 1 per input | LayerNormalization, pooling |
| Rsqrt | 2 per output | LayerNormalization |
| Einsum, AddV2, Erf, Sigmoid, Resize | none | **all products of MultiHeadAttention**, its biases, residuals |

- LayerNormalization (epsilon 1e-6 is too small for the fused kernel): two Means, a SquaredDifference, a Rsqrt per
  token, and x * (inv * gamma) + (beta - mean * inv * gamma) with inv * gamma broadcast to the full size: three
  Muls, a Sub.
- Exact GELU, 0.5 * x * (1 + erf(x / sqrt 2)): two Muls and a RealDiv.
- MultiHeadAttention: the scaling of the queries (a Mul over heads * key width) and the Softmax; nothing else.
- TokenLearner 1.0: a Mul of maps and features, broadcast to (S, N, C), and the Mean over it. 1.1: an Einsum, which is
  not counted.
- The Rescaling at the input is a Mul on the picture of 32 x 32 pixels. Dropout and augmentation are not in the graph.

These numbers therefore exclude most of attention. Use `fewtokens.analysis.cost.macs` to compare models, and these
numbers only to compare with the example.
"""

from collections.abc import Callable
from math import prod
from typing import Any

from torch import nn

from fewtokens.backbones.keras_mini_vit import KerasBlock
from fewtokens.backbones.vit import ViT
from fewtokens.errors import FewtokensError
from fewtokens.tokenizers.base import Tokenizer
from fewtokens.tokenizers.token_learner import TokenLearner, TokenLearnerV11Grouped


def is_keras_example(model: nn.Module) -> bool:
    """Return whether a model is one of the example's.

    It has `KerasBlock`s, and as tokenizers none, TokenLearner 1.0 (mean pooling, exact GELU) or the grouped 1.1.
    """
    return (
        isinstance(model, ViT)
        and all(isinstance(block, KerasBlock) for block in model.encoder.blocks)
        and all(_is_known(tokenizer) for tokenizer in model.encoder.tokenizers)
    )


def keras_flops(model: ViT, source_size: tuple[int, int] = (32, 32)) -> int:
    """Return the FLOPs that TensorFlow's profiler finds. The example prints half of them, in 1e9 with four digits.

    Args:
        model: A model of the backbone `keras_mini_vit`.
        source_size: Height and width of the picture before the example resizes it, those of CIFAR-10.

    Raises:
        FewtokensError: The model is not one of the example's.
    """
    if not is_keras_example(model):
        found = sorted({type(part).__name__ for part in (*model.encoder.blocks, *model.encoder.tokenizers)})
        raise FewtokensError(
            "The Keras example's count needs backbone=keras_mini_vit with tokenizer none, token_learner "
            f"(pooling=mean, gelu=none) or token_learner_v11_grouped, got {', '.join(found)}. Use cost/gmacs, which "
            "counts any model."
        )
    embed: Any = model.vit.patch_embed.proj
    head: Any = model.vit.head
    parts: Any = zip(model.encoder.tokenizers, model.encoder.blocks, strict=True)
    dim, tokens = embed.out_channels, prod(model.vit.patch_embed.grid_size)
    total = prod(source_size) * embed.in_channels + _conv(embed, tokens)
    for tokenizer, block in parts:
        total += _TOKENIZERS[type(tokenizer)](tokenizer, tokens)
        tokens = getattr(tokenizer, "num_tokens", tokens)
        total += _block(block, tokens)
    return total + _norm(tokens, dim) + tokens * dim + _dense(head, 1) + 5 * head.out_features


def _block(block: Any, tokens: int) -> int:
    attention, mlp = block.attn, block.mlp
    dim, heads = attention.qkv.in_features, attention.num_heads
    scaled = tokens * heads * attention.head_dim
    softmax = 5 * heads * tokens * tokens
    mlp_flops = sum(_dense(layer, tokens) + _gelu(tokens * layer.out_features) for layer in (mlp.fc1, mlp.fc2))
    return 2 * _norm(tokens, dim) + scaled + softmax + mlp_flops


def _plain(tokenizer: Any, tokens: int) -> int:
    return 0


def _token_learner(tokenizer: Any, tokens: int) -> int:
    dim, maps = tokenizer.context.dim, tokenizer.num_tokens * tokens
    convs = sum(_conv(conv, tokens) for conv in tokenizer.convs)
    return _norm(tokens, dim) + convs + (len(tokenizer.convs) - 1) * _gelu(maps) + 2 * maps * dim


def _token_learner_grouped(tokenizer: Any, tokens: int) -> int:
    convs = sum(_conv(conv, tokens) for conv in (tokenizer.group, tokenizer.project, tokenizer.value))
    return _norm(tokens, tokenizer.context.dim) + convs + 5 * tokenizer.num_tokens * tokens


def _norm(tokens: int, dim: int) -> int:
    return 8 * tokens * dim + 2 * tokens


def _gelu(elements: int) -> int:
    return 3 * elements


def _dense(layer: Any, rows: int) -> int:
    return 2 * rows * layer.in_features * layer.out_features + rows * layer.out_features


def _conv(layer: Any, positions: int) -> int:
    bias = 0 if layer.bias is None else positions * layer.out_channels
    return 2 * positions * layer.weight.numel() + bias  # weights are (out, in / groups, *kernel)


_TOKENIZERS: dict[type[Tokenizer], Callable[[Any, int], int]] = {
    Tokenizer: _plain,
    TokenLearner: _token_learner,
    TokenLearnerV11Grouped: _token_learner_grouped,
}


def _is_known(tokenizer: Any) -> bool:
    if type(tokenizer) is TokenLearner:
        return tokenizer.pooling == "mean" and tokenizer.act.approximate == "none"
    return type(tokenizer) in _TOKENIZERS
