"""Sinkhorn: learned centres share the patches out among them by optimal transport.

Haurum et al., "Multi-Scale Hybrid Vision Transformer and Sinkhorn Tokenizer for Sewer Defect Classification",
Automation in Construction 2022, and as a baseline in Haurum et al., "Which Tokens to Use?", 2023 (arXiv 2308.04657).
Checked against the code of the latter, github.com/JoakimHaurum/TokenReduction; the papers' equations were not read.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fewtokens.errors import FewtokensError
from fewtokens.tokenizers.base import LayerContext, Pooler, bias_per_frame, tokens_made, without_autocast
from fewtokens.tokens import Tokens


class Sinkhorn(Pooler):
    """S learned centres, an entropic transport plan between them and the patches, the tokens its weighted means.

    The plan is the one that the cosines of centres and patches ask for and in which every patch has as much to give as
    any other and every centre gets as much, so that no two centres take the same. A patch of several (ToMe) has as
    often as much to give, padding nothing.

    Where it leaves the code of Haurum et al., on purpose: tokens are means of the patches as they are, there sums of
    patches of length 1, about N/S of them, at a scale foreign to the stream that they return to; and only the
    directions of the centres are read, there they are set to length 1 in place at every call.

    Args:
        context: Where it stands.
        num_tokens: Tokens per frame, S: a number, or with a float the share of those that the place before left.
        iterations: Of the plan (command in the README of the first paper's code: 5; default of the second's: 3).
        epsilon: Strength of the entropy: the larger, the more even the plan (the same command: 0.25; default of the
            second's: 1, at which cosines hardly tell).
    """

    def __init__(self, context: LayerContext, num_tokens: int | float = 0.5, iterations: int = 5, epsilon: float = 0.25) -> None:
        super().__init__(context, tokens_made(context, num_tokens))
        if iterations < 0 or not epsilon > 0:
            raise FewtokensError(
                "Sinkhorn's plan takes a number of iterations at a strength of entropy",
                expected="iterations >= 0 and epsilon > 0",
                got=f"iterations={iterations}, epsilon={epsilon}",
                fix="set tokenizer.build.iterations=5 and tokenizer.build.epsilon=0.25",
            )
        self.iterations, self.epsilon = iterations, epsilon
        self.centres = nn.Parameter(F.normalize(torch.randn(self.num_tokens, context.dim), dim=1))

    def maps(self, tokens: Tokens) -> Float[Tensor, "bt s m"]:
        """How much of every patch goes into each new token (B*T, S, N/T), which sums to 1 over the patches."""
        patches = tokens.per_frame
        wide = torch.promote_types(patches.dtype, torch.float32)
        with without_autocast(patches.device):
            centres, patches = (F.normalize(x.to(wide), dim=-1) for x in (self.centres, patches))
            logits = centres @ patches.transpose(1, 2) / self.epsilon
        return transport(logits, bias_per_frame(tokens), self.iterations)

    def pool(self, tokens: Tokens) -> Tokens:
        """S tokens per frame, with centres shared between frames."""
        maps = self.maps(tokens).to(tokens.x.dtype)
        return tokens.resample_per_frame(maps @ tokens.per_frame, maps)


def transport(
    logits: Float[Tensor, "b s m"], mass: Float[Tensor, "b 1 m"] | None, iterations: int
) -> Float[Tensor, "b s m"]:
    """The transport plan of entropy 1, by Sinkhorn's iterations on logarithms, every row divided by its sum.

    Rows sum to 1, and columns, as near as the iterations come, to S times the share of their patch in the whole mass.

    Args:
        logits: What is gained by bringing a patch to a centre, over the strength of the entropy (B, S, N).
        mass: Logarithm of what every patch has to give (B, 1, N); None where all have the same.
        iterations: 0 leaves a softmax.
    """
    weighed = logits if mass is None else logits + mass
    shift = torch.zeros_like(logits[:, :1])
    for _ in range(iterations):
        rows = (weighed + shift).logsumexp(dim=2, keepdim=True)
        shift = -(logits - rows).logsumexp(dim=1, keepdim=True)
    return (weighed + shift).softmax(dim=2)
