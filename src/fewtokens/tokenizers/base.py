"""The interface of all token-reduction methods, and the two families that most of them belong to."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fewtokens.errors import FewtokensError, check
from fewtokens.layers.block import Block
from fewtokens.tokens import Tokens

KeepRate = float | Sequence[float]
NumTokens = int | float | Sequence[int | float]
ROUNDING = 1e-9  # 0.1 * 30 is slightly above 3 in floating point, and must not be rounded up to 4.

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class LayerContext:
    """The place of a tokenizer in its encoder, from which a method builds itself, or raises an error.

    Args:
        dim: Width C of the tokens.
        heads: Number of attention heads of the block.
        block: Index of the tokenizer's block.
        depth: Number of blocks.
        prefix: Number P of class and register tokens before the patch tokens.
        class_token: Whether the first of them is a class token.
        frames: Number T of time steps in which the patches are laid out.
        grid: Height and width (H, W) of the grid of patches within a frame, as the backbone embeds them.
        stage: Number of tokenizers before this one.
        stages: Number of tokenizers in the encoder.
        full_grid: Whether all patches reach every stage, as inside of TokenFuser. Otherwise each stage reduces what the
            previous one left.
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
    full_grid: bool = False


class Tokenizer(nn.Module):
    """Carries tokens through one block. This base class reduces nothing: it is the plain transformer.

    A method overrides `forward` and calls the block where it acts: before the block (`block(reduce(tokens))`), inside
    it (`block.attend`, select tokens by the attention state, `block.feed_forward`) or around it.

    Args:
        context: The place in the encoder. The encoder passes it; all other arguments come from the config.
    """

    keeps_frames: ClassVar[bool] = False
    """Tell whether every time step has the same tokens in the same order afterwards, as attention over time needs it.

    The plain tokenizer (exactly this class) keeps everything, whatever it says here.
    """

    adaptive: ClassVar[bool] = False
    """Tell whether the number of tokens depends on the image, so that some images cost more than others."""

    def __init__(self, context: LayerContext) -> None:
        super().__init__()
        self.context = context

    def forward(self, tokens: Tokens, block: Block) -> Tokens:
        """Return the tokens after the block."""
        return block(tokens)

    def loss(self) -> Float[Tensor, ""] | None:
        """Return a loss to add in training, after a forward pass; None if the method has none."""
        return None


class Pooler(Tokenizer):
    """Base of methods that replace the patches by a fixed number of new tokens before the block.

    Each new token is a mixture of the patches. Subclasses implement `pool`. TokenFuser can wrap any of them.

    Args:
        context: The place in the encoder.
        num_tokens: Number S of new tokens per frame. A float in (0, 1] is a share, rounded up, of the tokens that reach
            the place. A list has one of these for each block in `tokenizer.at`.

    Raises:
        FewtokensError: The number is invalid, or the list has another length.
    """

    keeps_frames = True

    def __init__(self, context: LayerContext, num_tokens: NumTokens) -> None:
        super().__init__(context)
        available, self.num_tokens = pooled_count(num_tokens, context)
        if self.num_tokens > available:
            _warn_of_more_tokens(type(self).__name__, self.num_tokens, available)

    def pool(self, tokens: Tokens) -> Tokens:
        """Return the record with S new tokens per frame instead of the patches, and with the same prefix."""
        raise NotImplementedError

    def forward(self, tokens: Tokens, block: Block) -> Tokens:
        """Pool the tokens and run the block."""
        return block(self.pool(tokens))


class Selector(Tokenizer):
    """Base of methods that reduce the patches to a share of them, by selection or by clustering.

    The number is rounded up, as in EViT's code, and at least one patch stays. With `keep_rate=1` the method does
    nothing.

    Args:
        context: The place in the encoder.
        keep_rate: Share of the patches that stay, of those that reach the place: a float in (0, 1], or a list with one
            for each block in `tokenizer.at`.

    Raises:
        FewtokensError: The share is invalid, or the list has another length.
    """

    def __init__(self, context: LayerContext, keep_rate: KeepRate) -> None:
        super().__init__(context)
        self.keep_rate = keep_rates(keep_rate, context)[context.stage]

    def keep_highest(self, tokens: Tokens, scores: Float[Tensor, "b m"]) -> Tokens:
        """Keep the patches with the highest scores (B, N), in their order."""
        if num_kept(tokens.num_patches, self.keep_rate) == tokens.num_patches:
            return tokens
        return tokens.select(*top_positions(scores, self.keep_rate, valid_patches(tokens)))


def one_per_stage(name: str, value: T | Sequence[T], context: LayerContext) -> list[T]:
    """Return the value of a setting at every stage: those of a list, or one value repeated.

    Args:
        name: The setting's name below `tokenizer.build`, for the error message.
        value: One value, or a list with one for each stage.
        context: The place in the encoder.

    Raises:
        FewtokensError: The list has another length.
    """
    if not isinstance(value, Sequence):
        return [value] * context.stages
    if len(value) != context.stages:
        raise FewtokensError(
            f"`tokenizer.build.{name}` must be one value, or a list with one for each of the {context.stages} blocks "
            f"in `tokenizer.at`, got a list of {len(value)}."
        )
    return list(value)


def keep_rates(keep_rate: KeepRate, context: LayerContext) -> list[float]:
    """Return the keep rates of all stages.

    Raises:
        FewtokensError: One of them is not in (0, 1], or the list has another length than there are stages.
    """
    rates = one_per_stage("keep_rate", keep_rate, context)
    check(all(0 < rate <= 1 for rate in rates), "tokenizer.build.keep_rate", "above 0 and at most 1", keep_rate)
    return rates


def num_kept(count: int, keep_rate: float) -> int:
    """Return how many of `count` patches stay: the share `keep_rate`, rounded up, but at least 1."""
    return max(1, math.ceil(keep_rate * count - ROUNDING))


def pooled_count(num_tokens: NumTokens, context: LayerContext) -> tuple[int, int]:
    """Return the number of tokens per frame that reach a `Pooler`, and the number that it makes of them.

    Raises:
        FewtokensError: A number is invalid, or the list has another length than there are stages.
    """
    counts = one_per_stage("num_tokens", num_tokens, context)
    check(
        all(count >= 1 if isinstance(count, int) else 0 < count <= 1 for count in counts),
        "tokenizer.build.num_tokens",
        "an int >= 1, or a float above 0 and at most 1",
        num_tokens,
    )
    before = after = context.grid[0] * context.grid[1]
    for count in counts[context.stage if context.full_grid else 0 : context.stage + 1]:
        before, after = after, count if isinstance(count, int) else num_kept(after, count)
    return before, after


@cache  # One warning for each setting, not for each block.
def _warn_of_more_tokens(method: str, num_tokens: int, available: int) -> None:
    log.warning(
        "%s makes %d tokens per frame out of %d, so it reduces nothing. To save computation, lower num_tokens.",
        method,
        num_tokens,
        available,
    )


def valid_patches(tokens: Tokens) -> Bool[Tensor, "b m"] | None:
    """Return False where a patch token is padding (B, N); None if there is no padding."""
    return None if tokens.mask is None else tokens.mask[:, tokens.prefix :]


def highest(scores: Float[Tensor, "b m"], count: int) -> Int[Tensor, "b k"]:
    """Return the positions of the `count` highest scores, in descending order; of equal scores, the first positions."""
    # topk is not used, since which of several equal scores it returns depends on the device.
    return scores.argsort(dim=1, descending=True, stable=True)[:, :count]


def top_positions(
    scores: Float[Tensor, "b m"], keep_rate: float, valid: Bool[Tensor, "b m"] | None = None
) -> tuple[Int[Tensor, "b k"], Bool[Tensor, "b k"] | None]:
    """Return the positions of the highest scores in ascending order; of equal scores, the first positions count.

    Args:
        scores: Scores (B, N).
        keep_rate: Share to keep of the valid positions of each sample.
        valid: False where a position is padding (B, N); None if there is no padding.

    Returns:
        Positions (B, K), where K is the share of N, and None; or, if `valid` is given, a mask (B, K) that is False
        where a sample has fewer than K positions to keep.
    """
    total = scores.shape[1]
    count = num_kept(total, keep_rate)
    if valid is None:
        return highest(scores, count).sort(dim=1).values, None
    order = highest(scores.masked_fill(~valid, float("-inf")), count)
    # A table of integers, since float32 rounds differently than num_kept and some devices (MPS) have no float64.
    counts = torch.tensor([num_kept(n, keep_rate) for n in range(total + 1)], device=scores.device)
    kept = torch.arange(count, device=scores.device) < counts[valid.sum(dim=1, keepdim=True)]
    # Padding is sorted to the end, whatever its positions are.
    return torch.where(kept, order, order + total).sort(dim=1).values % total, kept


def bias_per_frame(tokens: Tokens) -> Float[Tensor, "bt 1 m"] | None:
    """Return the bias of `Tokens.bias` for a softmax over the patches in the layout of `per_frame` (B*T, 1, N/T)."""
    bias = tokens.bias()
    return None if bias is None else bias[..., tokens.prefix :].reshape(-1, 1, tokens.num_patches // tokens.frames)


def check_class_token(tokenizer: Tokenizer) -> None:
    """Raise an error if the backbone has no class token.

    Raises:
        FewtokensError: There is none.
    """
    if not tokenizer.context.class_token:
        raise FewtokensError(
            f"{type(tokenizer).__name__} scores patches by the attention of the class token, but the backbone has "
            "none. Choose a backbone with a class token (set backbone.pool=token), or a tokenizer that needs none, "
            "such as tome."
        )


def check_no_padding(tokenizer: Tokenizer, tokens: Tokens) -> None:
    """Raise an error if some tokens are padding.

    Raises:
        FewtokensError: There is padding.
    """
    if tokens.mask is not None:
        raise FewtokensError(
            f"{type(tokenizer).__name__} makes the same number of tokens of every sample and takes no padded tokens, "
            "but an adaptive tokenizer before it has padded them. Place it before that tokenizer."
        )
