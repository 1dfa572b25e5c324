"""The encoder: a stack of layers, each a transformer block with the tokenizer that carries tokens through it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fewtokens.errors import FewtokensError, check
from fewtokens.layers.block import Block
from fewtokens.tokenizers.base import LayerContext, Tokenizer
from fewtokens.tokens import Tokens

Build = Callable[[LayerContext], Tokenizer]
At = int | float | str | Sequence[int | float]


class EncoderLayer(nn.Module):
    """A tokenizer and its transformer block.

    This is the module that the encoder repeats. Forward hooks, FSDP, `torch.compile` and activation checkpointing apply
    to it, since a tokenizer may call the two halves of the block by name and not the block itself.

    Args:
        tokenizer: Carries the tokens through the block.
        block: The transformer block.
    """

    def __init__(self, tokenizer: Tokenizer, block: nn.Module) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.block = block

    def forward(self, tokens: Tokens) -> Tokens:
        """Return the tokens after the block."""
        return self.tokenizer(tokens, self.block)


class Encoder(nn.Module):
    """A stack of `EncoderLayer`.

    Args:
        blocks: The transformer blocks.
        build: Recipe of the tokenizer. It is called once for every block in `at`, so that blocks share no parameters.
        at: Blocks with a tokenizer, see `block_indices`. The others get the plain `Tokenizer`, which reduces nothing.
        context: The properties of the encoder. Block index, depth and stage are filled in.

    Attributes:
        grad_checkpointing: Recompute the activations of each layer in the backward pass instead of storing them.
    """

    def __init__(self, blocks: Sequence[nn.Module], build: Build, at: At, context: LayerContext) -> None:
        super().__init__()
        check(callable(build), "tokenizer.build", "values with a _target_", build)
        tokenizers = build_tokenizers(build, at, replace(context, depth=len(blocks)))
        self.layers = nn.ModuleList(map(EncoderLayer, tokenizers, blocks))
        self.grad_checkpointing = False

    def forward(self, tokens: Tokens) -> Tokens:
        """Return the tokens after the last layer."""
        recompute = self.grad_checkpointing and self.training and torch.is_grad_enabled()
        for layer in self.layers:
            tokens = checkpoint(layer, tokens, use_reentrant=False) if recompute else layer(tokens)
        return tokens

    @property
    def tokenizers(self) -> list[Tokenizer]:
        """Return the tokenizer of every layer."""
        return [cast(Tokenizer, layer.tokenizer) for layer in self.layers]

    @property
    def blocks(self) -> list[Block]:
        """Return the transformer block of every layer."""
        return [cast(Block, layer.block) for layer in self.layers]

    @contextmanager
    def without_reduction(self) -> Iterator[None]:
        """Return a context in which the same weights run as the plain transformer, as a baseline."""
        tokenizers = self.tokenizers
        self.replace_tokenizers([Tokenizer(tokenizer.context) for tokenizer in tokenizers])
        try:
            yield
        finally:
            self.replace_tokenizers(tokenizers)

    def replace_tokenizers(self, tokenizers: Sequence[Tokenizer]) -> None:
        """Give every layer another tokenizer."""
        for layer, tokenizer in zip(self.layers, tokenizers, strict=True):
            layer.tokenizer = tokenizer


def build_tokenizers(build: Build, at: At, context: LayerContext) -> list[Tokenizer]:
    """Return one tokenizer for every block.

    Args:
        build: Recipe of the tokenizers of the blocks in `at`. The others get the plain `Tokenizer`.
        at: See `block_indices`.
        context: The properties of the encoder. Block index and stage are filled in.
    """
    stages = {block: stage for stage, block in enumerate(block_indices(at, context.depth))}
    contexts = [
        replace(context, block=index, stage=stages.get(index, 0), stages=len(stages)) for index in range(context.depth)
    ]
    return [build(here) if here.block in stages else Tokenizer(here) for here in contexts]


def block_indices(at: At, depth: int) -> list[int]:
    """Return the sorted indices of the blocks that `at` names; a tokenizer acts before or in its block.

    An int is an index, a float in [0, 1) a relative depth (0.5 of 12 blocks is block 6), a string such as "0.5:" every
    block from there on, and a list several of the first two. Scenic's `tokenlearner_loc` is such an index. The Keras
    example's "after block i" is i + 1.

    Raises:
        FewtokensError: A value is out of range, no number, or given twice.
    """
    if isinstance(at, str):
        return list(range(_first_of_range(at, depth), depth))
    if not isinstance(at, int | float | Iterable):
        raise _invalid_at(at, depth)
    entries: list[Any] = [at] if isinstance(at, int | float) else list(at)
    indices = [_block_index(entry, depth) for entry in entries]
    if len(set(indices)) < len(indices):
        raise FewtokensError(
            f"`tokenizer.at` must name different blocks, got {entries}, which are blocks {indices} of {depth}."
        )
    return sorted(indices)


def _first_of_range(at: str, depth: int) -> int:
    start = at.removesuffix(":")
    if start == at:
        raise _invalid_at(at, depth)
    try:
        return _block_index(float(start) if "." in start else int(start), depth)
    except ValueError:
        raise _invalid_at(at, depth) from None


def _block_index(entry: int | float, depth: int) -> int:
    if isinstance(entry, bool) or not isinstance(entry, int | float):
        raise _invalid_at(entry, depth)
    index = entry if isinstance(entry, int) else int(entry * depth + 1e-9) if 0 <= entry < 1 else -1
    if not 0 <= index < depth:
        raise _invalid_at(entry, depth)
    return index


def _invalid_at(at: object, depth: int) -> FewtokensError:
    return FewtokensError(
        f"`tokenizer.at` must be a block index from 0 to {depth - 1}, a relative depth d with 0 <= d < 1, 'd:' for all "
        f"blocks from there on, or a list of blocks such as [3,6,9], got {at!r}."
    )
