"""Other memory layouts of an ATS block with padding, for the comparison in docs/benchmark.md (ats_layouts.sh).

The images of a batch keep different numbers of tokens. `fewtokens.tokenizers.ats.ATS` pads them and computes the
feed-forward part on the real tokens only. These classes have the same output, for inference on a CPU, in blocks
without dropout, drop path and gate, and for tokens that were not merged before.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fewtokens.layers.attention import Attention, AttentionState
from fewtokens.layers.block import Block
from fewtokens.tokenizers.ats import ATS
from fewtokens.tokens import Tokens


class Padded(ATS):
    """Computes everything on padding, too."""

    def forward(self, tokens: Tokens, block: Block) -> Tokens:
        """Return what ATS returns, except in padding."""
        x = block.attend(tokens, lambda state: self.choose(tokens, state))[0]
        return x.update(block._feed_forward(x.x))


class LinearOnReal(ATS):
    """Computes all linear and normalization layers on the real tokens, and attention with padding and a mask."""

    def forward(self, tokens: Tokens, block: Block) -> Tokens:
        """Return what ATS returns, except in padding."""
        attn, norm = block.attn, block.norm1
        before = Packing(tokens)
        both = attn._project(norm(before.pack(tokens.x)), slice(attn.attn_dim, None))
        key, value = attn._split(before.unpack(both), 2)
        lead = attn.project_queries(norm(tokens.x[:, : tokens.prefix]))
        state = AttentionState(lead, attn.k_norm(key), value, tokens.bias(), attn.scale)
        kept = tokens.select(*self.choose(tokens, state))
        after = Packing(kept)
        x = after.pack(kept.x)
        query = attn._split(after.unpack(attn._project(norm(x), slice(attn.attn_dim))), 1)[0]
        out = self.attend(attn, replace(state, query=attn.q_norm(query)), before, after)
        x = x + block.ls1(attn.proj(attn.norm(after.pack(out.transpose(1, 2).flatten(2)))))
        return kept.update(after.unpack(block._feed_forward(x)))

    def attend(self, attn: Attention, state: AttentionState, before: "Packing", after: "Packing") -> Tensor:
        """Return the weighted values (B, heads, Q, D)."""
        return attn._weighted_values(state)


class AllOnReal(LinearOnReal):
    """Computes everything on the real tokens: attention runs image by image, without a mask."""

    def attend(self, attn: Attention, state: AttentionState, before: "Packing", after: "Packing") -> Tensor:
        """Return the weighted values (B, heads, Q, D), with zeros in padding."""
        if state.bias is None and after.rows is None:
            return super().attend(attn, state, before, after)
        out = torch.zeros_like(state.query)
        for image, (keys, queries) in enumerate(zip(before.lengths, after.lengths, strict=True)):
            one = slice(image, image + 1)
            out[one, :, :queries] = F.scaled_dot_product_attention(
                state.query[one, :, :queries], state.key[one, :, :keys], state.value[one, :, :keys]
            )
        return out


class Packing:
    """Positions of the real tokens of a batch; without padding, nothing is moved.

    Args:
        tokens: The batch. Its padding, if any, is at the end of every sequence.
    """

    def __init__(self, tokens: Tokens) -> None:
        self.shape, mask = tokens.x.shape[:2], tokens.mask
        self.rows = None if mask is None else mask.flatten().nonzero()[:, 0]
        self.lengths = [self.shape[1]] * self.shape[0] if mask is None else mask.sum(dim=1).tolist()

    def pack(self, x: Tensor) -> Tensor:
        """Return the real tokens (1, R, C) of x (B, N, C)."""
        flat = x.flatten(0, 1)
        return (flat if self.rows is None else flat.index_select(0, self.rows))[None]

    def unpack(self, x: Tensor) -> Tensor:
        """Return real tokens (1, R, C) as a batch (B, N, C), with zeros in padding."""
        flat = x[0]
        if self.rows is not None:
            flat = flat.new_zeros(self.shape[0] * self.shape[1], flat.shape[1]).index_copy_(0, self.rows, flat)
        return flat.unflatten(0, self.shape)
