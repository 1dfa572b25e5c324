"""Sinkhorn: learned centers divide the patches among themselves by optimal transport.

Haurum et al., "Multi-Scale Hybrid Vision Transformer and Sinkhorn Tokenizer for Sewer Defect Classification",
Automation in Construction 2022, and as a baseline in Haurum et al., "Which Tokens to Use?", 2023 (arXiv 2308.04657).
Checked against the code of the latter, github.com/JoakimHaurum/TokenReduction. The papers' equations were not read.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fewtokens.errors import check
from fewtokens.layers.attention import autocast_disabled
from fewtokens.tokenizers.base import LayerContext, NumTokens, Pooler, bias_per_frame
from fewtokens.tokens import Tokens


class Sinkhorn(Pooler):
    """Computes an entropic transport plan between S learned centers and the patches; tokens are its weighted means.

    The plan maximizes the cosine similarity of centers and patches under two constraints: all patches give equally
    much, and all centers receive equally much, so that no two centers take the same patches. A patch of size s (ToMe)
    gives s times as much, and padding gives nothing.

    It differs from the code of Haurum et al. in two ways: tokens here are means of the unchanged patches, while there
    they are sums of about N/S patches normalized to length 1, whose scale does not fit the residual stream; and only
    the directions of the centers are used, while there they are normalized in place in every call.

    Args:
        context: The place in the encoder.
        num_tokens: Number S of tokens per frame, see `Pooler`.
        iterations: Number of Sinkhorn iterations (command in the README of the first paper's code: 5; default of the
            second's: 3).
        epsilon: Strength of the entropy; the larger it is, the more uniform the plan (the same command: 0.25; default
            of the second's code: 1, at which cosines hardly matter).
    """

    def __init__(
        self, context: LayerContext, num_tokens: NumTokens = 0.5, iterations: int = 5, epsilon: float = 0.25
    ) -> None:
        super().__init__(context, num_tokens)
        check(iterations >= 0, "tokenizer.build.iterations", "an int >= 0", iterations)
        check(epsilon > 0, "tokenizer.build.epsilon", "above 0", epsilon)
        self.iterations, self.epsilon = iterations, epsilon
        self.centers = nn.Parameter(F.normalize(torch.randn(self.num_tokens, context.dim), dim=1))

    def maps(self, tokens: Tokens) -> Float[Tensor, "bt s m"]:
        """Return the weight of every patch in each new token (B*T, S, N/T), which sums to 1 over the patches."""
        patches = tokens.per_frame
        wide = torch.promote_types(patches.dtype, torch.float32)
        with autocast_disabled(patches.device):
            centers, patches = (F.normalize(x.to(wide), dim=-1) for x in (self.centers, patches))
            logits = centers @ patches.transpose(1, 2) / self.epsilon
        return transport(logits, bias_per_frame(tokens), self.iterations)

    def pool(self, tokens: Tokens) -> Tokens:
        """Return S tokens per frame. All frames have the same centers."""
        maps = self.maps(tokens).to(tokens.x.dtype)
        return tokens.resample_per_frame(maps @ tokens.per_frame, maps)


def transport(
    logits: Float[Tensor, "b s m"], mass: Float[Tensor, "b 1 m"] | None, iterations: int
) -> Float[Tensor, "b s m"]:
    """Return the transport plan by Sinkhorn's iterations on logarithms, with every row divided by its sum.

    Rows sum to 1. Columns sum to S times the patch's share of the total mass, as closely as the iterations get.

    Args:
        logits: Gain of moving a patch to a center, divided by the strength of the entropy (B, S, N).
        mass: Logarithm of the mass of every patch (B, 1, N); None if all are equal.
        iterations: Number of iterations; 0 gives a softmax.
    """
    weighted = logits if mass is None else logits + mass
    shift = torch.zeros_like(logits[:, :1])
    for _ in range(iterations):
        rows = (weighted + shift).logsumexp(dim=2, keepdim=True)
        shift = -(logits - rows).logsumexp(dim=1, keepdim=True)
    return (weighted + shift).softmax(dim=2)
