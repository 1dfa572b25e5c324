"""PatchMerger: a few learned queries attend once to all patches.

Renggli et al., "Learning to Merge Tokens in Vision Transformers", 2022 (arXiv 2202.12015): Y = softmax(W^T X^T) X.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewtokens.tokenizers.base import LayerContext, NumTokens, Pooler, check_no_padding
from fewtokens.tokens import Tokens


class PatchMerger(Pooler):
    """Computes attention of S learned queries to the normalized patches; tokens are the weighted means of the latter.

    Z = LN(x); weights = softmax(W Z^T C^-1/2) over N; tokens = weights @ Z. The norm, its epsilon of 1e-5 and its
    output as the values are those of the ports in vit-pytorch and in JoakimHaurum/TokenReduction. No official code was
    found. It needs no grid.

    Args:
        context: The place in the encoder (paper: one, in the middle).
        num_tokens: Number S of tokens per frame, see `Pooler` (paper: 8).
        scale: Multiply the logits by C^-1/2, as vit-pytorch does. The paper's formula and the code of Haurum et al. do
            not. Queries are initialized as unit normals, so that without it the softmax starts almost one-hot.
    """

    def __init__(self, context: LayerContext, num_tokens: NumTokens = 8, scale: bool = True) -> None:
        super().__init__(context, num_tokens)
        self.norm = nn.LayerNorm(context.dim)
        self.queries = nn.Parameter(torch.randn(self.num_tokens, context.dim))
        self.scale = context.dim**-0.5 if scale else 1.0

    def maps(self, normalized: Float[Tensor, "b m c"]) -> Float[Tensor, "b s m"]:
        """Return the weight of every patch in each new token (B, S, N), which sums to 1, for normalized patches."""
        return ((self.queries * self.scale) @ normalized.transpose(1, 2)).softmax(dim=-1)

    def pool(self, tokens: Tokens) -> Tokens:
        """Return S tokens per frame. All frames share the queries."""
        check_no_padding(self, tokens)
        normalized = self.norm(tokens.per_frame)
        maps = self.maps(normalized)
        return tokens.resample_per_frame(maps @ normalized, maps)
