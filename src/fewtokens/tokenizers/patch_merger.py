"""PatchMerger: a few learned queries attend once to all patches.

Renggli et al., "Learning to Merge Tokens in Vision Transformers", 2022 (arXiv 2202.12015): Y = softmax(W^T X^T) X.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewtokens.tokenizers.base import LayerContext
from fewtokens.tokenizers.token_learner import LAYER_NORM_EPS, MapPooler
from fewtokens.tokens import Tokens


class PatchMerger(MapPooler):
    """S learned queries, a softmax over the patches, the tokens their weighted means of the normalised patches.

    Z = LN(x); weights = softmax(W Z^T C^-1/2) over N; tokens = weights @ Z. The norm, and its output as the values, are
    those of the port in vit-pytorch; neither was checked against official code. It needs no lattice.

    Args:
        context: Where it stands (paper: one, in the middle).
        num_tokens: Tokens per frame, S (paper: 8).
        scale: Multiply the logits by C^-1/2, as vit-pytorch does; the paper's formula has none. Queries start as unit
            normals, so that without it the softmax starts almost one-hot.
    """

    def __init__(self, context: LayerContext, num_tokens: int = 8, scale: bool = True) -> None:
        super().__init__(context, num_tokens)
        self.norm = nn.LayerNorm(context.dim, eps=LAYER_NORM_EPS)
        self.queries = nn.Parameter(torch.randn(num_tokens, context.dim))
        self.scale = context.dim**-0.5 if scale else 1.0

    def maps(self, patches: Float[Tensor, "b m c"], tokens: Tokens) -> Float[Tensor, "b s m"]:
        """Softmax over the positions, one map per query."""
        return attend(self.queries * self.scale, self.norm(patches))

    def values(self, patches: Float[Tensor, "b m c"]) -> Float[Tensor, "b m c"]:
        """The normalised patches."""
        return self.norm(patches)


def attend(queries: Float[Tensor, "s c"], keys: Float[Tensor, "b m c"]) -> Float[Tensor, "b s m"]:
    """Weights of all keys (B, N, C) for every query (S, C), which sum to 1 over N."""
    return (queries @ keys.transpose(1, 2)).softmax(dim=-1)
