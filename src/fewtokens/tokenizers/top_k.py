"""Top-k: keep the patches that the class token attends to most."""

from jaxtyping import Float
from torch import Tensor

from fewtokens.errors import FewtokensError
from fewtokens.layers.attention import AttentionState
from fewtokens.layers.block import Block
from fewtokens.tokenizers.base import LayerContext, Selector
from fewtokens.tokens import Tokens


class TopK(Selector):
    """Inside a block, between attention and MLP, the share of patches with the highest class-token attention stays.

    The choice of EViT (Liang et al., ICLR 2022, section 3.2), dropping the others as its ablation without fusion does.
    It has no parameters and works off the shelf; gradients reach what stays, and not the choice.

    Args:
        context: Where it stands; there must be a class token.
        keep_rate: Share of the patches that stay, rounded up (EViT: 0.7, before blocks 3, 6 and 9 of 12).
    """

    def __init__(self, context: LayerContext, keep_rate: float = 0.7) -> None:
        super().__init__(context, keep_rate)
        if not context.class_token:
            raise FewtokensError(
                f"{type(self).__name__} keeps what the class token attends to",
                expected="a backbone with a class token",
                got="one that has none",
                fix="set backbone.pool=token, or use tokenizer=tome or tokenizer=token_learner",
            )

    def forward(self, tokens: Tokens, block: Block) -> Tokens:
        """Attention, the choice, the MLP."""
        tokens, state = block.attend(tokens)
        if self.keep_rate < 1:
            tokens = self.keep_highest(tokens, class_attention(state, tokens.prefix).detach())
        del state  # it would be there beside the MLP, which is the peak of memory
        return block.feed_forward(tokens)


def class_attention(state: AttentionState, prefix: int) -> Float[Tensor, "b m"]:
    """Attention that the class token, the first of all, pays to every patch (B, N), the mean over the heads."""
    return state.attention_rows(1)[:, :, 0, prefix:].mean(dim=1)
