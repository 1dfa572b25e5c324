"""The encoder: tokenizers carry tokens through blocks."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

from torch import nn

from fewtokens.errors import FewtokensError
from fewtokens.tokenizers.base import Place, Tokenizer
from fewtokens.tokens import Tokens

Build = Callable[[Place], Tokenizer]
At = int | float | str | Sequence[int | float]


class Encoder(nn.Module):
    """Blocks, and for each block the tokenizer that carries the tokens through it.

    Args:
        blocks: The transformer blocks.
        build: Recipe of the tokenizer, called once for every place, so that no two blocks share parameters.
        at: Before which blocks the tokenizer stands, see `block_indices`; the others get the plain one.
        place: What holds for the whole encoder; block and stage are filled in.
    """

    def __init__(self, blocks: Sequence[nn.Module], build: Build, at: At, place: Place) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        stages = block_indices(at, len(self.blocks))
        self.tokenizers = nn.ModuleList()
        for index in range(len(self.blocks)):
            here = replace(place, block=index, depth=len(self.blocks), stages=len(stages))
            if index in stages:
                self.tokenizers.append(build(replace(here, stage=stages.index(index))))
            else:
                self.tokenizers.append(Tokenizer(here))

    def forward(self, tokens: Tokens) -> Tokens:
        """The tokens after the last block."""
        for tokenizer, block in zip(self.tokenizers, self.blocks, strict=True):
            tokens = tokenizer(tokens, block)
        return tokens

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Within it, the same weights run as the plain transformer, so that both can be compared."""
        reducing = self.tokenizers
        plain = [Tokenizer(cast(Tokenizer, tokenizer).place) for tokenizer in reducing]
        self.tokenizers = nn.ModuleList(plain)
        try:
            yield
        finally:
            self.tokenizers = reducing


def block_indices(at: At, depth: int) -> list[int]:
    """Indices of the blocks that `at` names, rising. "Before block i".

    An int is an index, a float in [0, 1) a relative depth (0.5 of 12 blocks is block 6), a string "0.5:" every block
    from there on; a list holds several. Scenic's `tokenlearner_loc` is such an index; the Keras example's "after block
    i" is i + 1.

    Raises:
        FewtokensError: Out of range, named twice, or not a number.
    """
    if isinstance(at, str):
        start = at.removesuffix(":")
        if start == at:
            raise _bad_at(at, depth)
        try:
            first = float(start) if "." in start else int(start)
        except ValueError:
            raise _bad_at(at, depth) from None
        return list(range(_block_index(first, depth), depth))
    if not isinstance(at, int | float | Iterable):
        raise _bad_at(at, depth)
    entries: list[Any] = [at] if isinstance(at, int | float) else list(at)
    indices = [_block_index(entry, depth) for entry in entries]
    if len(set(indices)) < len(indices):
        raise FewtokensError(
            "One tokenizer stands before a block",
            expected="different blocks",
            got=f"tokenizer.at={list(entries)}, which is blocks {indices} of {depth}",
            fix="name each block once",
        )
    return sorted(indices)


def _block_index(entry: int | float, depth: int) -> int:
    if isinstance(entry, bool) or not isinstance(entry, int | float):
        raise _bad_at(entry, depth)
    index = entry if isinstance(entry, int) else int(entry * depth + 1e-9) if 0 <= entry < 1 else -1
    if not 0 <= index < depth:
        raise _bad_at(entry, depth)
    return index


def _bad_at(at: object, depth: int) -> FewtokensError:
    return FewtokensError(
        "A tokenizer stands before a block of the backbone",
        expected=f"a block index 0..{depth - 1}, a relative depth 0 <= d < 1, or 'd:' for all blocks from there on",
        got=f"tokenizer.at={at!r} for {depth} blocks",
        fix="set tokenizer.at=0.5, tokenizer.at=[3,6,9] or tokenizer.at='0.5:'",
    )
