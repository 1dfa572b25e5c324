"""Top-k: keep the patches that the class token attends to most."""

from jaxtyping import Float
from torch import Tensor

from fewtokens.layers.attention import AttentionState
from fewtokens.layers.block import Block
from fewtokens.tokenizers.base import KeepRate, LayerContext, Selector, check_class_token
from fewtokens.tokens import Tokens


class TopK(Selector):
    """Keeps the patches with the highest class-token attention, inside a block, between attention and MLP.

    This is the selection of EViT (Liang et al., ICLR 2022, section 3.2) without its fused token, which the paper
    reports as an ablation. The method has no parameters and works in pretrained models. Gradients reach the patches
    that stay, but not the choice.

    Args:
        context: The place in the encoder, which must have a class token.
        keep_rate: Share of the patches that stay, see `Selector` (EViT: 0.7, in blocks 3, 6 and 9 of 12).

    Raises:
        FewtokensError: There is no class token, or the share is invalid.
    """

    def __init__(self, context: LayerContext, keep_rate: KeepRate = 0.7) -> None:
        super().__init__(context, keep_rate)
        check_class_token(self)

    def forward(self, tokens: Tokens, block: Block) -> Tokens:
        """Compute attention, select patches, and run the MLP."""
        tokens, state = block.attend(tokens)
        if self.keep_rate < 1:
            tokens = self.keep_highest(tokens, class_attention(state, tokens.prefix).detach())
        del state  # Otherwise its memory is still taken during the MLP, where memory use peaks.
        return block.feed_forward(tokens)


def class_attention(state: AttentionState, prefix: int) -> Float[Tensor, "b m"]:
    """Return the attention of the class token, the first token, to every patch (B, N): the mean over heads."""
    return state.class_attention()[:, :, prefix:].mean(dim=1)
