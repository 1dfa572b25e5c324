"""Other memory layouts of an ATS block with padding, for the comparison in docs/benchmark.md (ats_layouts.sh).

The images of a batch keep different numbers of tokens. On a CPU, `fewtokens.tokenizers.ats.ATS` computes everything on
the real tokens only, with attention image by image. These classes have the same output, for inference, in blocks
without dropout, drop path and gate, and for tokens that were not merged before.
"""

from dataclasses import replace
from functools import partial

from fewtokens.layers.attention import AttentionState
from fewtokens.layers.block import Block
from fewtokens.layers.packed import Packing
from fewtokens.tokenizers.ats import ATS
from fewtokens.tokens import Tokens


class Padded(ATS):
    """Computes everything on padding, too, as on a GPU."""

    def forward(self, tokens: Tokens, block: Block) -> Tokens:
        """Return what ATS returns, except in padding."""
        tokens = block.attend(tokens, partial(self.choose, tokens))[0]
        return tokens.update(block._feed_forward(tokens.x))


class FeedForwardOnReal(ATS):
    """Computes the feed-forward half on the real tokens, and attention with its projections with padding."""

    def forward(self, tokens: Tokens, block: Block) -> Tokens:
        """Return what ATS returns, except in padding."""
        return block.feed_forward(block.attend(tokens, partial(self.choose, tokens))[0])


class LinearOnReal(ATS):
    """Computes all linear and normalization layers on the real tokens, and attention with padding and a mask."""

    def forward(self, tokens: Tokens, block: Block) -> Tokens:
        """Return what ATS returns, except in padding."""
        attn, norm = block.attn, block.norm1
        before = Packing.of(tokens)
        both = attn._project(norm(before.pack(tokens.x)), slice(attn.attn_dim, None))
        key, value = attn._split(before.unpack(both), 2)
        lead = attn.project_queries(norm(tokens.x[:, : tokens.prefix]))
        state = AttentionState(lead, attn.k_norm(key), value, tokens.bias(), attn.scale)
        kept = tokens.select(*self.choose(tokens, state))
        after = Packing.of(kept)
        x = after.pack(kept.x)
        query = attn._split(after.unpack(attn._project(norm(x), slice(attn.attn_dim))), 1)[0]
        out = attn.weighted_values(replace(state, query=attn.q_norm(query)))
        x = x + block.ls1(attn.proj(attn.norm(after.pack(out.transpose(1, 2).flatten(2)))))
        return kept.update(after.unpack(block._feed_forward(x)))
