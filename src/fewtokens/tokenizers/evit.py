"""EViT: keep the patches that the class token attends to, and fuse the others into one token.

Liang et al., "Not All Patches Are What You Need: Expediting Vision Transformers via Token Reorganizations", ICLR 2022
(arXiv 2202.07800), section 3.2.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fewtokens.layers.block import Block
from fewtokens.tokenizers.base import KeepRate, LayerContext, num_kept, top_positions, valid_patches
from fewtokens.tokenizers.top_k import TopK, class_attention
from fewtokens.tokens import Tokens


class EViT(TopK):
    """Keeps the patches with the highest class-token attention and fuses the others, between attention and MLP.

    The fused token is the sum of a_i x_i over the dropped patches, where a_i is the attention of the class token,
    averaged over heads. It is appended as the last patch, and later stages treat it like any other patch. Gradients
    reach the dropped patches and, through a_i, the attention.

    Args:
        context: The place in the encoder, which must have a class token.
        keep_rate: Share of the patches that stay, see `Selector` (paper: 0.7, in blocks 3, 6 and 9 of 12).
        fuse: Whether to add the fused token. Without it, EViT is top-k.
        normalize: Divide the a_i by their sum, so that the fused token is a mean with the scale of a patch. Without it,
            it is the sum of the paper and the official code, whose norm shrinks with the attention to dropped patches.
    """

    def __init__(
        self, context: LayerContext, keep_rate: KeepRate = 0.7, fuse: bool = True, normalize: bool = False
    ) -> None:
        super().__init__(context, keep_rate)
        self.fuse, self.normalize = fuse, normalize

    def forward(self, tokens: Tokens, block: Block) -> Tokens:
        """Compute attention, select and fuse patches, and run the MLP."""
        if not self.fuse or num_kept(tokens.num_patches, self.keep_rate) == tokens.num_patches:
            return super().forward(tokens, block)
        tokens, state = block.attend(tokens)
        tokens = self.reorganize(tokens, class_attention(state, tokens.prefix))
        del state  # to free its memory before the MLP, see top_k
        return block.feed_forward(tokens)

    def reorganize(self, tokens: Tokens, attention: Float[Tensor, "b m"]) -> Tokens:
        """Return the patches with the highest attention (B, N), followed by the fused token."""
        valid = valid_patches(tokens)
        index, kept = top_positions(attention.detach(), self.keep_rate, valid)
        dropped = torch.ones_like(attention, dtype=torch.bool) if valid is None else valid
        not_kept = torch.zeros_like(index, dtype=torch.bool) if kept is None else dropped.gather(1, index) & ~kept
        dropped = dropped.scatter(1, index, not_kept)
        weights = fusion_weights(attention, dropped, self.normalize)[:, None].to(tokens.x.dtype)
        fused = tokens.resample(weights @ tokens.patches, weights)
        if valid is not None:  # In an image without dropped patches, the fused token is padding.
            mask = torch.ones_like(fused.x[..., 0], dtype=torch.bool)
            mask[:, -1] = dropped.any(dim=1)
            fused = replace(fused, mask=mask)
        return tokens.select(index, kept).join(fused)


def fusion_weights(
    attention: Float[Tensor, "b m"], dropped: Bool[Tensor, "b m"], normalize: bool
) -> Float[Tensor, "b m"]:
    """Return the weight of every patch in the fused token (B, N): its attention if it is dropped, otherwise 0."""
    weights = attention * dropped
    if not normalize:
        return weights
    # If the attention to all dropped patches is exactly zero, they are averaged with equal weights.
    weights = torch.where(weights.sum(dim=1, keepdim=True) > 0, weights, dropped.to(weights.dtype))
    return weights / weights.sum(dim=1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
