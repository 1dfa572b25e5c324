"""SiT: weighted means of the patches, with weights from a small MLP and a learned temperature.

Zong et al., "Self-slimmed Vision Transformer", ECCV 2022 (arXiv 2111.12624), the Token Slimming Module; checked against
the official code, github.com/Sense-X/SiT.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewtokens.tokenizers.base import LayerContext, Pooler, bias_per_frame, tokens_made
from fewtokens.tokens import Tokens


class SiT(Pooler):
    """Token Slimming Module: an MLP per patch, a softmax over the patches, the tokens their weighted means.

    LN(x) -> Linear to C/2 -> GELU -> Linear to S -> times `scale`, one over the paper's temperature -> softmax over N;
    tokens = weights @ x. A patch of several (ToMe) counts as often, padding not at all.

    Not here: the paper's Feature Recalibration Distillation, in which a reversed module and a dense teacher take part
    in training. Its accuracies are with it.

    Args:
        context: Where it stands (official code: three places, each leaving half).
        num_tokens: Tokens per frame, S: a number, or with a float the share of those that the place before left.
    """

    def __init__(self, context: LayerContext, num_tokens: int | float = 0.5) -> None:
        super().__init__(context, tokens_made(context, num_tokens))
        hidden = max(1, context.dim // 2)
        self.mlp = nn.Sequential(
            nn.LayerNorm(context.dim), nn.Linear(context.dim, hidden), nn.GELU(), nn.Linear(hidden, self.num_tokens)
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.scale = nn.Parameter(torch.ones(()))

    def maps(self, tokens: Tokens) -> Float[Tensor, "bt s m"]:
        """How much of every patch goes into each new token (B*T, S, N/T), which sums to 1 over the patches."""
        logits = (self.mlp(tokens.per_frame) * self.scale).transpose(1, 2)
        bias = bias_per_frame(tokens)
        return (logits if bias is None else logits + bias).softmax(dim=2)

    def pool(self, tokens: Tokens) -> Tokens:
        """S tokens per frame, with weights shared between frames."""
        maps = self.maps(tokens)
        return tokens.resample_per_frame(maps @ tokens.per_frame, maps)
