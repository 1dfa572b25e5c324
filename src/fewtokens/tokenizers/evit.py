"""EViT: keep the attentive patches, fuse the others into one.

Liang et al., "Not All Patches Are What You Need: Expediting Vision Transformers via Token Reorganizations", ICLR 2022
(arXiv 2202.07800), section 3.2.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fewtokens.layers.block import Block
from fewtokens.tokenizers.base import LayerContext, highest, share
from fewtokens.tokenizers.top_k import TopK, class_attention
from fewtokens.tokens import Tokens


class EViT(TopK):
    """Inside a block, between attention and MLP: top-k by class-token attention, and one token for all the others.

    The fused token is the sum of a_i x_i over the dropped patches, a_i the class token's attention, averaged over the
    heads. It comes last, and is a patch like any other to later places. Gradients reach the dropped patches and,
    through a_i, the attention.

    Args:
        context: Where it stands; there must be a class token.
        keep_rate: Share of the patches that stay, rounded up (paper: 0.7, before blocks 3, 6 and 9 of 12).
        fuse: False drops the others; then it is top-k.
        normalize: Divide the a_i by their sum, so that the fused token is a mean, as large as a patch. False is the
            paper's and the official code's sum, which is shorter the less attention the dropped ones got.
    """

    def __init__(self, context: LayerContext, keep_rate: float = 0.7, fuse: bool = True, normalize: bool = False) -> None:
        super().__init__(context, keep_rate)
        self.fuse, self.normalize = fuse, normalize

    def forward(self, tokens: Tokens, block: Block) -> Tokens:
        """Attention, the choice and the fusion, the MLP."""
        if not self.fuse or share(tokens.num_patches, self.keep_rate) == tokens.num_patches:
            return super().forward(tokens, block)
        tokens, state = block.attend(tokens)
        tokens = self.reorganize(tokens, class_attention(state, tokens.prefix))
        del state  # memory, see top_k
        return block.feed_forward(tokens)

    def reorganize(self, tokens: Tokens, attention: Float[Tensor, "b m"]) -> Tokens:
        """The patches of the highest attention (B, N), then the fused others."""
        valid = None if tokens.mask is None else tokens.mask[:, tokens.prefix :]
        index, kept = highest(attention.detach(), self.keep_rate, valid)
        dropped = torch.ones_like(attention, dtype=torch.bool) if valid is None else valid
        gone = torch.zeros_like(index, dtype=torch.bool) if kept is None else dropped.gather(1, index) & ~kept
        dropped = dropped.scatter(1, index, gone)
        weights = shares(attention, dropped, self.normalize)[:, None].to(tokens.x.dtype)
        fused = tokens.resample(weights @ tokens.patches, weights)
        if valid is not None:  # an image with nothing to fuse has padding there
            some = torch.ones_like(fused.x[..., 0], dtype=torch.bool)
            some[:, -1] = dropped.any(dim=1)
            fused = replace(fused, mask=some)
        return tokens.select(index, kept).join(fused)


def shares(attention: Float[Tensor, "b m"], dropped: Bool[Tensor, "b m"], normalize: bool) -> Float[Tensor, "b m"]:
    """What of every patch goes into the fused token (B, N): its attention where it is dropped, else 0."""
    weights = attention * dropped
    if not normalize:
        return weights
    # A class token that looks at one patch alone leaves nothing, exactly, to the others: their mean is plain then.
    weights = torch.where(weights.sum(dim=1, keepdim=True) > 0, weights, dropped.to(weights.dtype))
    return weights / weights.sum(dim=1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
