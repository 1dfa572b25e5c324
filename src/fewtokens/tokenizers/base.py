"""The interface of every token-reduction method."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fewtokens.errors import FewtokensError
from fewtokens.layers.block import Block
from fewtokens.tokens import Tokens

ROUNDING = 1e-9  # 0.1 * 30 is above 3 in floating point: a share that is whole stays so


@dataclass(frozen=True)
class LayerContext:
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
    before (`block(make_fewer(tokens))`), inside (`attend`, choose by the state, `feed_forward`) or around.

    Args:
        context: Where it stands; given by the encoder, the other arguments by the configuration.
    """

    keeps_frames: ClassVar[bool] = False
    """Whether after it every time step has as many tokens, in the same order, so that attention over time can go on.

    Methods say so themselves; the plain transformer, which is only this class itself, keeps everything.
    """

    def __init__(self, context: LayerContext) -> None:
        super().__init__()
        self.context = context

    def forward(self, tokens: Tokens, block: Block) -> Tokens:
        """The tokens after the block."""
        return block(tokens)

    def loss(self) -> Float[Tensor, ""] | None:
        """What training adds to its loss after a forward pass; None for methods without a loss of their own."""
        return None


class Pooler(Tokenizer):
    """A method that makes a fixed number of new tokens before the block, each a mixture of the old.

    Subclasses give `pool`; TokenFuser can be put around any of them.

    Args:
        context: Where it stands.
        num_tokens: Tokens per frame that it makes, S.
    """

    keeps_frames = True

    def __init__(self, context: LayerContext, num_tokens: int) -> None:
        super().__init__(context)
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


class Selector(Tokenizer):
    """A method that leaves the share `keep_rate` of the patches: chosen ones, the others dropped, or means of clusters.

    The share is rounded up, as EViT's code does, and at least one patch stays. With keep_rate=1 nothing happens at all.

    Args:
        context: Where it stands.
        keep_rate: Share of the patches that stay, 0 < keep_rate <= 1.
    """

    def __init__(self, context: LayerContext, keep_rate: float) -> None:
        super().__init__(context)
        if not 0 < keep_rate <= 1:
            raise FewtokensError(
                f"{type(self).__name__} keeps a share of the patches",
                expected="0 < keep_rate <= 1",
                got=keep_rate,
                fix="set tokenizer.build.keep_rate to 0.7",
            )
        self.keep_rate = keep_rate

    def keep_highest(self, tokens: Tokens, scores: Float[Tensor, "b m"]) -> Tokens:
        """The record with the patches of the highest scores (B, N), in the order in which they lay."""
        if share(tokens.num_patches, self.keep_rate) == tokens.num_patches:
            return tokens
        valid = None if tokens.mask is None else tokens.mask[:, tokens.prefix :]
        return tokens.select(*highest(scores, self.keep_rate, valid))


def share(count: int, keep_rate: float) -> int:
    """`keep_rate` of `count`, rounded up, at least 1."""
    return max(1, math.ceil(keep_rate * count - ROUNDING))


def tokens_made(context: LayerContext, num_tokens: int | float) -> int:
    """Tokens per frame that a place makes: a number, or with a float the share of what the place before it left.

    Raises:
        FewtokensError: A share that is none.
    """
    if isinstance(num_tokens, int):
        return num_tokens
    if not 0 < num_tokens <= 1:
        raise FewtokensError(
            "num_tokens is a number of tokens or a share of the patches",
            expected="an int >= 1, or a float 0 < share <= 1",
            got=num_tokens,
            fix="set tokenizer.build.num_tokens to 8 or to 0.5",
        )
    left = context.grid[0] * context.grid[1]
    for _ in range(context.stage + 1):
        left = share(left, num_tokens)
    return left


def highest(
    scores: Float[Tensor, "b m"], keep_rate: float, valid: Bool[Tensor, "b m"] | None = None
) -> tuple[Int[Tensor, "b k"], Bool[Tensor, "b k"] | None]:
    """Positions of the highest scores, rising; of equal scores the first positions.

    Args:
        scores: (B, N).
        keep_rate: Share to keep, of every sample's own valid positions.
        valid: False where a position is padding (B, N); None where there is none.

    Returns:
        Positions (B, K), K the share of N, and None; or with `valid` a mask (B, K), False where a sample has fewer.
    """
    total = scores.shape[1]
    count = share(total, keep_rate)
    if valid is not None:
        scores = scores.masked_fill(~valid, float("-inf"))
    # Not topk: which of equal scores it takes depends on the device.
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    if valid is None:
        return order.sort(dim=1).values, None
    numbers = (valid.sum(dim=1, keepdim=True).double() * keep_rate - ROUNDING).ceil().clamp_min(1)
    kept = torch.arange(count, device=scores.device) < numbers
    # Padding goes last, whatever positions it holds.
    return torch.where(kept, order, order + total).sort(dim=1).values % total, kept


def bias_per_frame(tokens: Tokens) -> Float[Tensor, "bt 1 m"] | None:
    """`Tokens.bias` of the patches as `Tokens.per_frame` has them (B*T, 1, N/T): sizes and padding in a softmax."""
    bias = tokens.bias()
    return None if bias is None else bias[..., tokens.prefix :].reshape(-1, 1, tokens.num_patches // tokens.frames)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Within it products of matrices are as exact as their factors, whatever autocast is on."""
    kind = device.type  # "meta" knows no autocast
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
