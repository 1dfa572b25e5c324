"""DynamicViT: small networks score the patches, and learn to keep a given share of them.

Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification", NeurIPS 2021
(arXiv 2106.02034), sections 3.2 to 3.4. Networks, decisions, rounding and masked attention agree, in training and in
evaluation, with the code of Haurum et al., JoakimHaurum/TokenReduction.
"""

from dataclasses import replace
from math import prod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fewtokens.errors import check
from fewtokens.layers.block import Block
from fewtokens.tokenizers.base import (
    ROUNDING,
    KeepRate,
    LayerContext,
    Tokenizer,
    check_no_padding,
    highest,
    keep_rates,
)
from fewtokens.tokens import Tokens, with_prefix


class DynamicViT(Tokenizer):
    """Keeps the patches with the highest learned scores, before the block.

    In training, all patches stay in the batch. Each stage samples a decision to keep or drop each patch
    (Gumbel-softmax, straight-through). A dropped patch stays dropped, and other tokens do not attend to it, but its
    decision receives the gradient of what attending to it would change. `loss` pulls the kept share of each image
    towards the target of the stage. In evaluation, the patches with the highest scores are kept, the same number in
    every image, so that shapes are static.

    Memory: in training, the attention matrix of every head (B, heads, N, N) is built, since an additive mask, as fused
    kernels take it, passes no gradient to the decision on a dropped patch. Evaluation uses the fused kernels.

    The paper's accuracies are with two losses towards the dense model, see `fewtokens.tasks.distillation`. To fine-tune
    a dense model as in the paper, start from its run and let it teach (init_from=<dense run> task.teacher=<dense run>).

    Args:
        context: The place in the encoder (paper: blocks 3, 6 and 9 of 12).
        keep_rate: Share of the patches that a stage keeps of those that the previous one kept (paper: 0.7): a float in
            (0, 1], or a list with one for each block in `tokenizer.at`.
        ratio_weight: Weight of the loss on the kept share, averaged over the stages (paper: 2).
    """

    def __init__(self, context: LayerContext, keep_rate: KeepRate = 0.7, ratio_weight: float = 2.0) -> None:
        super().__init__(context)
        check(ratio_weight >= 0, "tokenizer.build.ratio_weight", "at least 0", ratio_weight)
        self.target = prod(keep_rates(keep_rate, context)[: context.stage + 1])
        self.weight = ratio_weight / context.stages
        # Of the embedded patches, rounded down, as in the code of Haurum et al.
        self.count = max(1, int(self.target * context.frames * prod(context.grid) + ROUNDING))
        self.predictor = Predictor(context.dim)
        self._shares: Tensor | None = None

    def forward(self, tokens: Tokens, block: Block) -> Tokens:
        """Decide on the patches and run the block."""
        check_no_padding(self, tokens)
        return block(self.decide(tokens) if self.training else self.choose(tokens))

    def choose(self, tokens: Tokens) -> Tokens:
        """Keep the patches with the highest scores, in their order."""
        if self.count >= tokens.num_patches:
            return tokens
        scores = self.predictor(tokens.patches, None)[..., 0]
        return tokens.select(highest(scores.detach(), self.count).sort(dim=1).values)

    def decide(self, tokens: Tokens) -> Tokens:
        """Sample a decision for each patch, and return all patches with a keep mask."""
        patches, prefix = tokens.patches, tokens.prefix
        before = patches.new_ones(patches.shape[:2]) if tokens.keep_mask is None else tokens.keep_mask[:, prefix:]
        scores = self.predictor(patches, before)
        keep_mask = F.gumbel_softmax(scores.float(), hard=True, dim=-1)[..., 0].to(before.dtype) * before
        self._shares = keep_mask.mean(dim=1)
        return replace(tokens, keep_mask=with_prefix(keep_mask, prefix))

    def loss(self) -> Float[Tensor, ""] | None:
        """Return the ratio loss of the last forward pass (section 3.4), once; None if there was no pass since.

        It is the squared distance of each image's kept share to the target, averaged over the batch.
        """
        shares, self._shares = self._shares, None
        return None if shares is None else self.weight * (shares.float() - self.target).square().mean()


class Predictor(nn.Module):
    """Predicts the log-probabilities of keeping and dropping each patch.

    The inputs are a patch's own features and the mean of the patches that are still kept.

    Args:
        dim: Width C of the tokens.
    """

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

    def forward(
        self, patches: Float[Tensor, "b m c"], keep_mask: Float[Tensor, "b m"] | None
    ) -> Float[Tensor, "b m two"]:
        """Return log-probabilities (B, N, 2) of keeping and dropping each patch.

        Args:
            patches: (B, N, C).
            keep_mask: 1 for the patches that are still kept (B, N), otherwise 0; None if all are.
        """
        own, common = self.embed(patches).tensor_split([self.local], dim=2)
        if keep_mask is None:
            common = common.mean(dim=1, keepdim=True)
        else:
            weights = keep_mask[..., None].to(common.dtype)
            common = (common * weights).sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True).clamp_min(1.0)
        return self.score(torch.cat([own, common.expand(-1, own.shape[1], -1)], dim=2)).log_softmax(dim=-1)
