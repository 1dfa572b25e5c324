"""DynamicViT: small networks score the patches, and learn under a loss on the share that they keep.

Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification", NeurIPS 2021
(arXiv 2106.02034), sections 3.2 to 3.4.
"""

from dataclasses import replace
from math import prod

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from fewtokens.errors import FewtokensError
from fewtokens.layers.block import Block
from fewtokens.tokenizers.base import ROUNDING, LayerContext, Tokenizer
from fewtokens.tokens import Tokens


class DynamicViT(Tokenizer):
    """Before a block, keeps the patches that a learned score ranks highest: keep^s of all at stage s = 1, 2, 3 ...

    In training all patches stay in the batch. Each stage draws keep-or-drop decisions (Gumbel-softmax, straight
    through); what was dropped once stays dropped, is not looked at by others any more, and gets a gradient as to what
    looking at it would have done. `loss` draws the share that an image keeps to the stage's target. In evaluation the
    highest scores go on, as many of every image, and shapes are static.

    Without the paper's two distillation losses towards the dense model: start from one (init_from=<dense run>) to
    fine-tune as it does. Details of the networks and of rounding are those of the official code from memory.

    Args:
        context: Where it stands (paper: blocks 3, 6 and 9 of 12).
        keep_rate: Share that each stage keeps of what the one before kept (paper: 0.7).
        ratio_weight: Of the loss on the share, its mean over the stages (paper: 2).
    """

    def __init__(self, context: LayerContext, keep_rate: float = 0.7, ratio_weight: float = 2.0) -> None:
        super().__init__(context)
        if not 0 < keep_rate <= 1 or ratio_weight < 0:
            raise FewtokensError(
                "DynamicViT keeps a share of the patches at every stage, and weighs the loss on it",
                expected="0 < keep_rate <= 1 and ratio_weight >= 0",
                got=f"keep_rate={keep_rate}, ratio_weight={ratio_weight}",
                fix="set tokenizer.build.keep_rate=0.7 tokenizer.build.ratio_weight=2.0",
            )
        self.target, self.weight = keep_rate ** (context.stage + 1), ratio_weight / context.stages
        # Of the patches that the backbone embeds, rounded down, as the official code does.
        self.count = max(1, int(self.target * context.frames * prod(context.grid) + ROUNDING))
        self.predictor = Predictor(context.dim)
        self._shares: Tensor | None = None

    def forward(self, tokens: Tokens, block: Block) -> Tokens:
        """Decide, then the block."""
        if tokens.mask is not None:
            raise FewtokensError(
                "DynamicViT keeps as many patches of every image, so none may be padding",
                expected="tokens without padding",
                got="padded tokens, from an adaptive tokenizer before it",
                fix="place it first, or leave the adaptive tokenizer out",
            )
        return block(self.decide(tokens) if self.training else self.choose(tokens))

    def choose(self, tokens: Tokens) -> Tokens:
        """The patches of the highest scores, in the order in which they lay."""
        if self.count >= tokens.num_patches:
            return tokens
        scores = self.predictor(tokens.patches, None)[..., 0]
        return tokens.select(first_highest(scores.detach(), self.count))

    def decide(self, tokens: Tokens) -> Tokens:
        """All patches, with a decision for each."""
        patches, prefix = tokens.patches, tokens.prefix
        before = patches.new_ones(patches.shape[:2]) if tokens.keep_mask is None else tokens.keep_mask[:, prefix:]
        scores = self.predictor(patches, before)
        keep_mask = F.gumbel_softmax(scores.float(), hard=True, dim=-1)[..., 0].to(before.dtype) * before
        self._shares = keep_mask.mean(dim=1)
        return replace(tokens, keep_mask=torch.cat([keep_mask.new_ones(len(keep_mask), prefix), keep_mask], dim=1))

    def loss(self) -> Float[Tensor, ""] | None:
        """Ratio loss (section 3.4): mean squared distance of the images' shares to the target; once per forward."""
        shares, self._shares = self._shares, None
        return None if shares is None else self.weight * (shares.float() - self.target).square().mean()


class Predictor(nn.Module):
    """Log-probabilities of staying and going for every patch, from its own features and the mean of those that stay."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        self.embed = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.score = nn.Sequential(
            nn.Linear(dim, half),
            nn.GELU(),
            nn.Linear(half, max(1, dim // 4)),
            nn.GELU(),
            nn.Linear(max(1, dim // 4), 2),
        )
        self.local = dim - half

    def forward(self, patches: Float[Tensor, "b m c"], keep_mask: Float[Tensor, "b m"] | None) -> Float[Tensor, "b m two"]:
        """(B, N, C) and the decisions so far (B, N), None for all, to (B, N, 2): staying, going."""
        own, common = self.embed(patches).tensor_split([self.local], dim=2)
        if keep_mask is None:
            common = common.mean(dim=1, keepdim=True)
        else:
            weights = keep_mask[..., None].to(common.dtype)
            common = (common * weights).sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True).clamp_min(1.0)
        return self.score(torch.cat([own, common.expand(-1, own.shape[1], -1)], dim=2)).log_softmax(dim=-1)


def first_highest(scores: Float[Tensor, "b m"], count: int) -> Int[Tensor, "b k"]:
    """Positions of the `count` highest scores, rising; of equal scores the first positions."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values
