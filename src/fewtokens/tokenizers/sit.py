"""SiT: weighted means of the patches, with weights from a small MLP and a learned temperature.

Zong et al., "Self-slimmed Vision Transformer", ECCV 2022 (arXiv 2111.12624), the Token Slimming Module. Checked against
the official code, github.com/Sense-X/SiT.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewtokens.tokenizers.base import LayerContext, NumTokens, Pooler, bias_per_frame
from fewtokens.tokens import Tokens


class SiT(Pooler):
    """Token Slimming Module: an MLP on each patch and a softmax over the patches give the weights of S means.

    LN(x) -> Linear to C/2 -> GELU -> Linear to S -> times `scale`, the inverse of the paper's temperature -> softmax
    over N; tokens = weights @ x. A patch of size s (ToMe) counts s times, and padding does not count.

    The paper's accuracies are with its Feature Recalibration Distillation, which adds a reversed module and a dense
    teacher to training: `task.distillation.match=recalibrated`, see `fewtokens.tasks.distillation`.

    Args:
        context: The place in the encoder (official code: three places, each of which leaves half).
        num_tokens: Number S of tokens per frame, see `Pooler`.
    """

    def __init__(self, context: LayerContext, num_tokens: NumTokens = 0.5) -> None:
        super().__init__(context, num_tokens)
        hidden = max(1, context.dim // 2)
        self.mlp = nn.Sequential(
            nn.LayerNorm(context.dim), nn.Linear(context.dim, hidden), nn.GELU(), nn.Linear(hidden, self.num_tokens)
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.scale = nn.Parameter(torch.ones(1))  # not a scalar, which FSDP does not shard

    def maps(self, tokens: Tokens) -> Float[Tensor, "bt s m"]:
        """Return the weight of every patch in each new token (B*T, S, N/T), which sums to 1 over the patches."""
        logits = (self.mlp(tokens.per_frame) * self.scale).transpose(1, 2)
        bias = bias_per_frame(tokens)
        return (logits if bias is None else logits + bias).softmax(dim=2)

    def pool(self, tokens: Tokens) -> Tokens:
        """Return S tokens per frame. All frames share the weights."""
        maps = self.maps(tokens)
        return tokens.resample_per_frame(maps @ tokens.per_frame, maps)
