"""The interface of every token-reduction method."""

from dataclasses import dataclass

from torch import nn

from fewtokens.errors import FewtokensError
from fewtokens.layers.block import Block
from fewtokens.tokens import Tokens


@dataclass(frozen=True)
class Place:
    """Where in an encoder a tokenizer stands: what a method may need to build itself, or to refuse.

    Args:
        dim: Width C of the tokens.
        heads: Attention heads of the block.
        block: Index of the block it stands before or in.
        depth: Number of blocks.
        prefix: Class and register tokens ahead of the patches.
        class_token: Whether the first of them is a class token.
        frames: Time steps among which the patches are spread.
        grid: Patches within a frame (H, W), as the backbone embeds them.
        stage: How many tokenizers stand before it.
        stages: How many tokenizers there are.
    """

    dim: int
    heads: int
    block: int
    depth: int
    prefix: int = 0
    class_token: bool = False
    frames: int = 1
    grid: tuple[int, int] = (1, 1)
    stage: int = 0
    stages: int = 1


class Tokenizer(nn.Module):
    """Carries tokens through one block. This one is the plain transformer: it reduces nothing.

    A method overrides `forward` and calls the block where it belongs:
    before (`block(make_fewer(tokens))`), inside (`attend`, choose by the evidence, `feed`) or around.

    Args:
        place: Where it stands; given by the encoder, the other arguments by the configuration.
    """

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place

    def forward(self, tokens: Tokens, block: Block) -> Tokens:
        """The tokens after the block."""
        return block(tokens)


class Pooler(Tokenizer):
    """A method that makes a fixed number of new tokens before the block, each a mixture of the old.

    Subclasses give `pool`; TokenFuser can be put around any of them.

    Args:
        place: Where it stands.
        num_tokens: Tokens per frame that it makes, S.
    """

    def __init__(self, place: Place, num_tokens: int) -> None:
        super().__init__(place)
        if num_tokens < 1:
            raise FewtokensError(
                f"{type(self).__name__} makes at least one token",
                expected="num_tokens >= 1",
                got=num_tokens,
                fix="set tokenizer.build.num_tokens to 8 or 16",
            )
        self.num_tokens = num_tokens

    def pool(self, tokens: Tokens) -> Tokens:
        """The record with S new patch tokens per frame in place of the old; the prefix stays."""
        raise NotImplementedError

    def forward(self, tokens: Tokens, block: Block) -> Tokens:
        """Pool, then the block."""
        return block(self.pool(tokens))
