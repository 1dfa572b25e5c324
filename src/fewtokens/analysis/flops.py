"""Multiply-adds per image, of the image alone and within its batch, and the number of tokens after every block.

An adaptive tokenizer spends more on some images than on others, and a batch also computes its padding. Both are counted
from the operations that the model runs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Size, Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fewtokens.analysis.evaluation import evaluating_eagerly
from fewtokens.backbones.vit import ViT
from fewtokens.tokens import Tokens

GIGA = 1e9


@dataclass(frozen=True)
class Counts:
    """The cost of some images.

    Args:
        macs: Multiply-adds of every image alone (N,).
        padded: Multiply-adds of every image within its batch, padding included (N,).
        tokens: Tokens before the first block and after every block, class and register tokens included (N, depth + 1);
            of a clip those of all time steps, of a factorised encoder those of the first, spatial one.
    """

    macs: Int[Tensor, " n"]
    padded: Float[Tensor, " n"]
    tokens: Int[Tensor, "n blocks"]


class SingleImageMacs:
    """Counts the multiply-adds of single images without running all of them.

    The multiply-adds follow from the shapes, and those of a block from the numbers of tokens before and after it. Each
    block is therefore counted once for every pair of numbers. If all images keep equally many tokens, one image is run.

    Args:
        model: In evaluation mode.
    """

    def __init__(self, model: ViT) -> None:
        self.model = model
        self.known: dict[tuple[int, int, int], int] = {}  # block (-1: all the rest), tokens before it, tokens after it

    def __call__(self, image: Float[Tensor, "1 c *t h w"], tokens: list[int]) -> int:
        """Return the multiply-adds of an image that keeps `tokens` before the first block and after every block."""
        keys = _keys(tokens)
        if not all(key in self.known for key in keys):
            total, counted, after = count_forward(self.model, image)
            # Rounding can decide a near tie differently in a batch: these are the tokens that the image keeps alone.
            keys = _keys(counted[0].tolist())
            blocks = [late - early for early, late in pairwise(after)]
            self.known |= zip(keys, [total - sum(blocks), *blocks], strict=True)
        return sum(self.known[key] for key in keys)


def count(model: ViT, batches: Iterable[Float[Tensor, "_ c *t h w"]], skip_equal: bool = False) -> Counts:
    """Count the images of some batches.

    Args:
        model: In any mode; it is evaluated.
        batches: At least one, on the model's device.
        skip_equal: Stop after the first batch if all images cost the same: no tokenizer is adaptive, and all images of
            the batch keep equally many tokens.
    """
    macs: list[int] = []
    padded: list[Tensor] = []
    numbers: list[Tensor] = []
    with evaluating_eagerly(model):
        single = SingleImageMacs(model)
        for images in batches:
            total, tokens, _ = count_forward(model, images)
            equal = bool((tokens == tokens[:1]).all())
            if len(tokens) == len(images):
                macs += [single(*pair) for pair in zip(images.split(1), tokens.tolist(), strict=True)]
            else:  # a factorised encoder, in which every time step is a sample
                macs += [total // len(images) if equal else count_forward(model, clip)[0] for clip in images.split(1)]
                tokens = tokens.unflatten(0, (len(images), -1)).sum(dim=1)
            padded.append(torch.full((len(images),), total / len(images), dtype=torch.float64))
            numbers.append(tokens)
            if skip_equal and equal and not any(tokenizer.adaptive for tokenizer in model.encoder.tokenizers):
                break
    return Counts(torch.tensor(macs), torch.cat(padded), torch.cat(numbers))


def count_forward(
    model: ViT, images: Float[Tensor, "b c *t h w"]
) -> tuple[int, Int[Tensor, "samples blocks"], list[int]]:
    """Run one forward pass and count it.

    Returns:
        The multiply-adds of the pass; the tokens of every sample before the first block and after every block, where a
        sample is an image, or a time step in a factorised encoder; the multiply-adds spent up to each of these points.
    """
    counter, tokens, macs = flop_counter(), list[Tensor](), list[int]()

    def record(module: nn.Module, inputs: tuple[Any, ...], output: Tokens | None = None) -> None:
        tokens.append(_token_counts(inputs[0] if output is None else output))
        macs.append(counter.get_total_flops() // 2)

    layers = model.encoder.layers
    handles = [layers[0].register_forward_pre_hook(record)]
    handles += [layer.register_forward_hook(record) for layer in layers]
    try:
        with counter:
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return counter.get_total_flops() // 2, torch.stack(tokens, dim=1).cpu(), macs


def flop_counter() -> FlopCounterMode:
    """Return a counter of matrix products and convolutions on any device, with two FLOPs per multiply-add."""
    # torch's own table has missed the attention kernel of one device or another (CPU: pytorch issue 195460).
    mapping = dict.fromkeys(_attention_kernels(), _attention_flops) | {
        torch.ops.aten.mv: _mv_flops,
        torch.ops.aten.dot: _mv_flops,
        torch.ops.aten.addmv: _addmv_flops,
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


def mean_tokens(tokens: Tokens) -> float:
    """Return the number of tokens of an image that are not padding, averaged over the batch."""
    return _token_counts(tokens).float().mean().item()


def _token_counts(tokens: Tokens) -> Int[Tensor, " b"]:
    batch, slots = tokens.x.shape[:2]
    return torch.full((batch,), slots) if tokens.mask is None else tokens.mask.sum(dim=1)


def _keys(tokens: list[int]) -> list[tuple[int, int, int]]:
    return [(-1, tokens[0], tokens[-1]), *((block, *pair) for block, pair in enumerate(pairwise(tokens)))]


def _attention_kernels() -> list[object]:
    """Return the kernels of `scaled_dot_product_attention` on all devices that this version of torch knows."""
    names = (
        "flash_attention",
        "flash_attention_for_cpu",
        "efficient_attention",
        "cudnn_attention",
        "fused_attention_overrideable",
        "attention_math_for_mps",
    )
    kernels = (getattr(torch.ops.aten, f"_scaled_dot_product_{name}", None) for name in names)
    return [kernel for kernel in kernels if kernel is not None]


def _attention_flops(query: Size, key: Size, value: Size, *_: object, **__: object) -> int:
    *batch, rows, width = query
    return 2 * prod(batch) * rows * key[-2] * (width + value[-1])


def _mv_flops(matrix: Size, vector: Size, *_: object, **__: object) -> int:
    return 2 * prod(matrix)


def _addmv_flops(bias: Size, matrix: Size, vector: Size, *_: object, **__: object) -> int:
    return 2 * prod(matrix)
