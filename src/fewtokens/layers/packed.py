"""Batches without padding: the real tokens of all images lie one behind the other, as a single sequence."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from fewtokens.layers.attention import AttentionState, autocast_disabled, block_diagonal
from fewtokens.tokens import Tokens

WeightedValues = Callable[[AttentionState], Float[Tensor, "b h q d"]]


@dataclass(frozen=True)
class Packing:
    """The places of the real tokens of a batch.

    Args:
        shape: Images B and tokens N of the batch, padding included.
        lengths: Number of real tokens of every image; their sum is R.
        rows: Positions of the real tokens among the B*N ones (R,); None if there is no padding, so that nothing moves.
    """

    shape: tuple[int, int]
    lengths: list[int]
    rows: Int[Tensor, " r"] | None

    @classmethod
    def of(cls, tokens: Tokens) -> "Packing":
        """Return the places of the tokens that `tokens.mask` does not mark as padding."""
        batch, count = tokens.x.shape[:2]
        if tokens.mask is None:
            return cls.without_padding(batch, count)
        return cls((batch, count), tokens.mask.sum(dim=1).tolist(), tokens.mask.flatten().nonzero()[:, 0])

    @classmethod
    def without_padding(cls, batch: int, count: int) -> "Packing":
        """Return the places of equally many tokens in all images."""
        return cls((batch, count), [count] * batch, None)

    def pack(self, x: Shaped[Tensor, "b n *c"]) -> Shaped[Tensor, "1 r *c"]:
        """Return the values of the real tokens (1, R, ...)."""
        flat = x.flatten(0, 1)
        return (flat if self.rows is None else flat.index_select(0, self.rows))[None]

    def unpack(self, x: Shaped[Tensor, "1 r *c"], fill: float = 0.0) -> Shaped[Tensor, "b n *c"]:
        """Return the values as a batch (B, N, ...), with `fill` in padding."""
        flat = x[0]
        if self.rows is not None:
            slots = flat.new_full((self.shape[0] * self.shape[1], *flat.shape[1:]), fill)
            flat = slots.index_copy_(0, self.rows, flat)
        return flat.unflatten(0, self.shape)

    def places(self, positions: Int[Tensor, "b k"]) -> Int[Tensor, "b k"]:
        """Return where the real tokens at some positions (B, K) lie among the R packed ones."""
        flat = positions + torch.arange(self.shape[0], device=positions.device)[:, None] * self.shape[1]
        if self.rows is None:
            return flat
        places = flat.new_zeros(self.shape[0] * self.shape[1])
        return places.index_copy_(0, self.rows, torch.arange(len(self.rows), device=flat.device))[flat]


@dataclass(frozen=True)
class PackedState:
    """Queries, keys and values of one attention layer for packed tokens. Attention runs image by image.

    Args:
        state: Keys and values of the R packed tokens (1, heads, R, D), and queries (1, heads, Q, D).
        keys: Places of the tokens with these keys.
        queries: Places of the tokens with these queries.
    """

    state: AttentionState
    keys: Packing
    queries: Packing

    def class_attention(self) -> Float[Tensor, "b h n"]:
        """Return the attention weights of the first token (B, heads, N), in float32, with zeros in padding.

        It takes heads * N * C multiply-adds per image, as that of `AttentionState`.
        """
        first = self.queries.places(torch.zeros(len(self.queries.lengths), 1, dtype=torch.int64))
        with autocast_disabled(self.state.query.device):
            query = self.state.query[0, :, first[:, 0]].transpose(0, 1).float() * self.state.scale
            keys = self.state.key[0].transpose(0, 1).flatten(1).float().split(self.keys.lengths)
            logits = torch.cat([key @ heads.T for key, heads in zip(keys, block_diagonal(query), strict=True)])[None]
        if self.state.bias is not None:
            logits = logits + self.state.bias[0, 0, 0, :, None].float()
        return self.keys.unpack(logits, float("-inf")).softmax(dim=1).transpose(1, 2)

    def value_norms(self) -> Float[Tensor, "b n"]:
        """Return the norm of the values, concatenated over heads (B, N), in float32, with zeros in padding."""
        return self.keys.unpack(self.state.value_norms())

    def weighted_values(self, attend: WeightedValues) -> Float[Tensor, "1 h q d"]:
        """Return the values, weighted by attention (1, heads, Q, D).

        Args:
            attend: Computes them for a batch. It is called for every image, or once if there is no padding.
        """
        images = [attend(image).transpose(1, 2).flatten(0, 1) for image in self._images()]
        return (images[0] if len(images) == 1 else torch.cat(images))[None].transpose(1, 2)

    def _images(self) -> Iterator[AttentionState]:
        query, key, value, bias = self.state.query, self.state.key, self.state.value, self.state.bias
        if self.keys.rows is None and self.queries.rows is None:
            query, key, value = (
                t[0].unflatten(1, (self.keys.shape[0], -1)).transpose(0, 1) for t in (query, key, value)
            )
            bias = None if bias is None else bias.view(-1, 1, 1, self.keys.shape[1])
            yield replace(self.state, query=query, key=key, value=value, bias=bias)
            return
        own, theirs = self.queries.lengths, self.keys.lengths
        biases = [None] * len(own) if bias is None else bias.split(theirs, dim=3)
        for parts in zip(query.split(own, 2), key.split(theirs, 2), value.split(theirs, 2), biases, strict=True):
            yield AttentionState(*parts, self.state.scale)
