"""Multiply-adds of images, alone and in batches, and the tokens that each keeps after every block.

An adaptive tokenizer spends more on one image than on another, and in a batch it spends on padding, too. Both are
counted as the model really runs.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Size, Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fewtokens.backbones.vit import ViT
from fewtokens.tokens import Tokens


@dataclass(frozen=True)
class Counts:
    """What some images cost.

    Args:
        macs: Multiply-adds of every image by itself (N,).
        padded: Multiply-adds of every image as its batch computed it, padding included (N,).
        tokens: Tokens before the first block and after every block, class and register tokens included (N, depth + 1);
            of a clip those of all time steps, of a factorised encoder those of the first, spatial one.
    """

    macs: Int[Tensor, " n"]
    padded: Float[Tensor, " n"]
    tokens: Int[Tensor, "n blocks"]


class Alone:
    """Multiply-adds of images by themselves, without running them all.

    They follow from shapes, and those of a block from the numbers of tokens before and after it. So a block is counted
    once for every pair of numbers: where all images keep as many, a single image is run.

    Args:
        model: In evaluation mode.
    """

    def __init__(self, model: ViT) -> None:
        self.model = model
        self.known: dict[tuple[int, int, int], int] = {}  # block (-1: all else), tokens before it, tokens after it

    def __call__(self, image: Float[Tensor, "1 c *t h w"], tokens: list[int]) -> int:
        """Of an image that keeps so many tokens, before the first block and after every block."""
        keys = _keys(tokens)
        if not all(key in self.known for key in keys):
            total, seen, after = run(self.model, image)
            keys = _keys(seen[0].tolist())  # a near tie may fall otherwise than in the batch: this is what it costs
            blocks = [late - early for early, late in pairwise(after)]
            self.known |= zip(keys, [total - sum(blocks), *blocks], strict=True)
        return sum(self.known[key] for key in keys)


def count(model: ViT, batches: Iterable[Float[Tensor, "_ c *t h w"]]) -> Counts:
    """Counts all images of some batches.

    Args:
        model: In any mode; it is evaluated.
        batches: On its device; at least one.
    """
    macs: list[int] = []
    padded: list[Tensor] = []
    numbers: list[Tensor] = []
    with evaluating(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        alone = Alone(model)
        for images in batches:
            total, tokens, _ = run(model, images)
            if len(tokens) == len(images):
                macs += [alone(*pair) for pair in zip(images.split(1), tokens.tolist(), strict=True)]
            else:  # a factorised encoder, to which every time step is a sample
                alike = bool((tokens == tokens[:1]).all())
                macs += [total // len(images) if alike else run(model, clip)[0] for clip in images.split(1)]
                tokens = tokens.unflatten(0, (len(images), -1)).sum(dim=1)
            padded.append(torch.full((len(images),), total / len(images), dtype=torch.float64))
            numbers.append(tokens)
    return Counts(torch.tensor(macs), torch.cat(padded), torch.cat(numbers))


def run(model: ViT, images: Float[Tensor, "b c *t h w"]) -> tuple[int, Int[Tensor, "samples blocks"], list[int]]:
    """The multiply-adds of one forward pass; tokens of every image before and after every block; multiply-adds then.

    A factorised encoder has the tokens of every time step.
    """
    counter, tokens, macs = flop_counter(), list[Tensor](), list[int]()

    def note(module: nn.Module, given: tuple[Any, ...], result: Tokens | None = None) -> None:
        tokens.append(_present(given[0] if result is None else result))
        macs.append(counter.get_total_flops() // 2)

    layers = model.encoder.layers
    handles = [layers[0].register_forward_pre_hook(note)]
    handles += [layer.register_forward_hook(note) for layer in layers]
    try:
        with counter:
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return counter.get_total_flops() // 2, torch.stack(tokens, dim=1).cpu(), macs


def flop_counter() -> FlopCounterMode:
    """Counts two FLOPs for each multiply-add of products and convolutions, on any device."""
    # Not left to torch's own table, which has missed a kernel of one device or another (CPU: pytorch issue 195460).
    mapping = dict.fromkeys(_attention_kernels(), _attention_flops) | {
        torch.ops.aten.mv: _mv_flops,
        torch.ops.aten.dot: _mv_flops,
        torch.ops.aten.addmv: _addmv_flops,
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


def alive(tokens: Tokens) -> float:
    """Tokens of an image that are not padding, the mean over the batch."""
    return float(tokens.x.shape[1]) if tokens.mask is None else tokens.mask.sum(dim=1).float().mean().item()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it the model is in evaluation mode; afterwards every module is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _present(tokens: Tokens) -> Int[Tensor, " b"]:
    batch, slots = tokens.x.shape[:2]
    return torch.full((batch,), slots) if tokens.mask is None else tokens.mask.sum(dim=1)


def _keys(tokens: list[int]) -> list[tuple[int, int, int]]:
    return [(-1, tokens[0], tokens[-1]), *((block, *pair) for block, pair in enumerate(pairwise(tokens)))]


def _attention_kernels() -> list[object]:
    """Whatever scaled_dot_product_attention dispatches to, on any device that this torch knows."""
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
