"""The transformer block, split into attention and feed-forward so that tokenizers can act in between."""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor

from fewtokens.layers.attention import Attention, AttentionState
from fewtokens.layers.packed import PackedState, Packing
from fewtokens.tokens import Tokens, take

Choice = tuple[Int[Tensor, "b k"], Bool[Tensor, "b k"] | None]
Choose = Callable[[AttentionState | PackedState], Choice]


class Block(TimmBlock):
    """timm's pre-norm block with its parameters and their names, working on `Tokens` and split into two halves.

    Pass it to timm as `block_fn=Block, attn_layer=Attention`. Tokenizers act before, between or around the halves.
    Where images have different numbers of tokens, inference on a CPU computes none of the padding.
    """

    attn: Attention

    def attend(self, tokens: Tokens, choose: Choose | None = None) -> tuple[Tokens, AttentionState]:
        """Compute x + attention(norm(x)).

        Args:
            tokens: The tokens before the block.
            choose: Selects the patches that stay before attention is computed, from a state that holds only the queries
                of the prefix. It returns index and mask as `Tokens.select` takes them. The keys and values of the other
                patches are still attended to, but their queries and outputs are not computed.

        Returns:
            The tokens after attention, and the state of the attention layer.
        """
        x = self.norm1(tokens.x)
        if choose is None:
            state = asked = self.attn.project_qkv(x, tokens.bias(), keep_mask=tokens.keep_mask)
        else:
            state = self.attn.project_qkv(x, tokens.bias(), asking=x[:, : tokens.prefix])
            index, mask = choose(state)
            x = take(x, tokens.rows(index))
            asked = replace(state, query=self.attn.project_queries(x))
            tokens = tokens.select(index, mask)
        return tokens.update(tokens.x + self.drop_path1(self.ls1(self.attn.attend(asked, x)))), state

    def feed_forward(self, tokens: Tokens) -> Tokens:
        """Compute x + mlp(norm(x)). Append the result to the trace, if there is one."""
        if tokens.mask is None or not self._packs(tokens):
            return _traced(tokens.update(self._feed_forward(tokens.x)))
        packing = Packing.of(tokens)
        return _traced(tokens.update(packing.unpack(self._feed_forward(packing.pack(tokens.x)))))

    def forward(self, tokens: Tokens, choose: Choose | None = None) -> Tokens:  # type: ignore[override]  # of a tensor
        """Compute both halves. `choose` is described in `attend`."""
        # In this order, since torch.export must not see a comparison with the number of images. One needs no padding.
        if self._packs(tokens) and (tokens.mask is not None or (choose is not None and len(tokens.x) > 1)):
            tokens, x, packing = self._attend_packed(tokens, choose)
            return _traced(tokens.update(packing.unpack(self._feed_forward(x))))
        return self.feed_forward(self.attend(tokens, choose)[0])

    def _attend_packed(self, tokens: Tokens, choose: Choose | None) -> tuple[Tokens, Float[Tensor, "1 r c"], Packing]:
        """Compute x + attention(norm(x)) without padding: linear layers for all images at once, attention for each.

        Returns:
            The tokens that stay, of which all but the features count; their features, packed; and their places.
        """
        attn, packing, bias = self.attn, Packing.of(tokens), replace(tokens, mask=None).bias()
        bias = None if bias is None else packing.pack(bias[:, 0, 0])[:, None, None]
        x = packing.pack(tokens.x)
        normed = self.norm1(x)
        if choose is None:
            queries, state = packing, attn.project_qkv(normed, bias)
        else:
            prefix = torch.arange(tokens.prefix).expand(len(tokens.x), -1)
            state = attn.project_qkv(normed, bias, asking=normed[:, packing.places(prefix).flatten()])
            index, mask = choose(PackedState(state, packing, Packing.without_padding(*prefix.shape)))
            places = packing.places(tokens.rows(index))
            tokens = tokens.update(tokens.x[..., :0]).select(index, mask)  # without features, which are selected here
            queries = Packing.of(tokens)
            x = x[:, queries.pack(places)[0]]
            normed = self.norm1(x)
            state = replace(state, query=attn.project_queries(normed))
        values = PackedState(state, packing, queries).weighted_values(attn.weighted_values)
        return tokens, x + self.ls1(attn.project_out(values, normed)), queries

    def _feed_forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def _packs(self, tokens: Tokens) -> bool:
        # With the numbers of tokens that ATS leaves of photographs, this is faster than with padding on a CPU (see
        # docs/benchmark.md). On a GPU, finding the real tokens waits for the device. In training, drop path acts on
        # samples, which rows are not.
        eager = not (self.training or torch.compiler.is_compiling())
        return eager and tokens.x.device.type == "cpu" and tokens.keep_mask is None


def _traced(tokens: Tokens) -> Tokens:
    if tokens.trace is not None:
        tokens.trace.append(tokens)
    return tokens
