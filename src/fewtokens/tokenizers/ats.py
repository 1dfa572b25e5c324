"""Adaptive Token Sampling: keep as many patches as the class token's attention is spread over.

Fayyaz et al., "Adaptive Token Sampling for Efficient Vision Transformers", ECCV 2022, sections 3.1 and 3.2, and the
official code, github.com/adaptivetokensampling/ATS. It has no parameters and works in pretrained models.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fewtokens.errors import check, check_choice
from fewtokens.layers.attention import AttentionState
from fewtokens.layers.block import Block, Choice
from fewtokens.layers.packed import PackedState
from fewtokens.tokenizers.base import LayerContext, Tokenizer, check_class_token, one_per_stage, valid_patches
from fewtokens.tokens import Tokens

Sample = tuple[Int[Tensor, "b m"], Bool[Tensor, "b m"]]
Budget = int | float | Literal["all"] | None

# Scores are scaled to integers up to 2^40, which is finer than the 24 bits of float32.
SCALE = 2**40


class ATS(Tokenizer):
    """Samples patches inside the block: scores them first, and computes attention only for the sampled ones.

    The score of a patch is the class token's attention to it, summed over heads, times the norm of its values,
    concatenated over heads. K probes are placed on the cumulative scores. Each probe picks one patch, and a patch
    picked by several stays once, so that few patches stay where attention is concentrated. Later stages sample from the
    patches that earlier ones left.

    Nothing is random, not even in training, and an image keeps the same patches alone and in any batch. Since images
    keep different numbers of patches, the batch is padded to the largest number, and `Tokens.mask` marks the padding.
    Inference on a CPU computes nothing on padding (see `Block`).

    In which sense it is differentiable: the selection is a hard gather. Gradients flow through the attention of the
    patches that stay, through the keys and values of all patches that these attend to, including those dropped here,
    and through the residual connection. None flows through scores, cumulative sums or probes, so nothing trains the
    network to select other patches. The official code does the same.

    Intended differences from the official code:
        - Minimum and first probe are computed from an image's own patches. There, padding changes both, so that an
          image in another batch keeps other patches, and logits differed by 0.49. Here every image keeps what it keeps
          alone there: the patch with the lowest score, which is at level 0, is never picked by the nearest rule, while
          there it stays in images with padding.
        - Of two remaining patches, the one with the higher score stays; there, both are dropped. A single one stays;
          there, its level is 0/0. If all scores are zero, they count as equal; there, they give NaN. At least one patch
          always stays.
        - With fewer probes than patches, probes pick from all levels. There, a token limit crashes, and with K probes
          only the K patches with the highest scores can be picked.
        - The sort is stable, and attention next to padding is exact, without the official epsilon of 1e-6.

    Args:
        context: The place in the encoder, which must have a class token.
        rule: How probes pick patches. "nearest" is the official code's rule: patches are sorted by score, levels
            (cumulative scores) run from 0 to 1, K probes are evenly spaced from the first level above 0 to 1, and each
            picks the nearest level. "inverse_transform" is described in `inverse_transform`.
        budget: Number K of probes, which is also the largest number of patches that can stay (besides class and
            register tokens): an int; a float in (0, 1], as a share of the embedded patches; None for as many as those
            (official); or "all" to drop nothing, which gives the plain transformer. A list has one of the first three
            for each block in `tokenizer.at`.
        static: Keep min(K, patches) slots, including padding, so that shapes after the block do not depend on values.
            Where padding is computed, this costs more of it. torch.compile and torch.export always do so.

    Raises:
        FewtokensError: There is no class token, or the rule or the budget is invalid.
    """

    adaptive = True

    def __init__(
        self,
        context: LayerContext,
        rule: Literal["nearest", "inverse_transform"] = "nearest",
        budget: Budget | Sequence[int | float | None] = None,
        static: bool = False,
    ) -> None:
        super().__init__(context)
        check_class_token(self)
        check_choice("tokenizer.build.rule", rule, RULES)
        self.sample, self.static = RULES[rule], static
        given: Any = budget
        single = budget is None or isinstance(budget, int | float | str)
        own = given if single else one_per_stage("budget", given, context)[context.stage]
        self.probes = _num_probes(own, context.frames * context.grid[0] * context.grid[1])

    def forward(self, tokens: Tokens, block: Block) -> Tokens:
        """Return the sampled tokens after the block (B, P + kept, C), with padding and without a grid."""
        if self.probes is None:
            return block(tokens)
        return block(tokens, partial(self.choose, tokens))

    @torch.no_grad()
    def choose(self, tokens: Tokens, state: AttentionState | PackedState) -> Choice:
        """Return the positions of the patches that stay (B, kept), and a mask of padding; None if there is none."""
        assert self.probes is not None
        scores = significance(state)[:, tokens.prefix :]
        valid = valid_patches(tokens)
        valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
        order, picked = self.sample(scores, valid, self.probes)
        recording = scores.is_cuda and torch.cuda.is_current_stream_capturing()  # a CUDA graph has fixed shapes, too
        if self.static or torch.compiler.is_compiling() or recording:
            return pack(order, picked, min(self.probes, tokens.num_patches))
        fewest, most = torch.stack(picked.sum(dim=1).aminmax()).tolist()  # the only synchronization with the device
        index, mask = pack(order, picked, most)
        return index, mask if fewest < most else None


def significance(state: AttentionState | PackedState) -> Float[Tensor, "b n"]:
    """Return the scores of all tokens (B, N), in float32 and not normalized (paper, equation 3).

    Only one row of the attention matrix is computed.
    """
    return state.class_attention().sum(dim=1) * state.value_norms()


def nearest(scores: Float[Tensor, "b m"], valid: Bool[Tensor, "b m"], probes: int) -> Sample:
    """Sample by the official rule: evenly spaced probes pick the nearest level of the sorted cumulative scores.

    Args:
        scores: Score of every patch (B, M), at least 0.
        valid: False where a patch is padding (B, M). Every image has at least one valid patch.
        probes: Number K of probes.

    Returns:
        The positions of the patches in ascending order of their scores, padding first (B, M), and for each of them
        whether it is picked (B, M).
    """
    steps = _integer_scores(scores, valid)
    order = steps.masked_fill(~valid, -1).sort(dim=1, stable=True).indices
    steps = steps.gather(1, order)
    lowest = steps.masked_fill(~valid.gather(1, order), SCALE).amin(dim=1, keepdim=True)
    sums = steps.cumsum(dim=1)
    spread = sums[:, -1:] - lowest
    levels = (sums - lowest).to(scores.dtype) / spread.clamp_min(1)  # 0 for the lowest patch, negative for padding
    levels = torch.cat([levels[:, :-1], torch.ones_like(levels[:, -1:])], dim=1)  # also 1 if only one patch is left
    return order, _picked_mask(pick_nearest(levels, probes), levels)


def pick_nearest(levels: Float[Tensor, "b m"], probes: int) -> Int[Tensor, "b k"]:
    """Return the position of the level that is nearest to each of K probes (B, K); of two equally near, the lower.

    Args:
        levels: Levels in ascending order (B, M).
        probes: Number K of probes. They are evenly spaced from the first level above 0 to 1; a single one is at 1.
    """
    first = levels.masked_fill(levels <= 0, 1.0).amin(dim=1, keepdim=True)
    steps = torch.arange(probes, dtype=levels.dtype, device=levels.device) / max(probes - 1, 1)
    at = first + (1 - first) * (steps if probes > 1 else steps + 1)
    above = torch.searchsorted(levels.contiguous(), at).clamp_max(levels.shape[1] - 1)
    below = (above - 1).clamp_min(0)
    return torch.where(at - levels.gather(1, below) <= levels.gather(1, above) - at, below, above)


def inverse_transform(scores: Float[Tensor, "b m"], valid: Bool[Tensor, "b m"], probes: int) -> Sample:
    """Sample by inverse transform (paper, section 3.2), from the cumulative scores in the order of the tokens.

    Probe i of K is at (2i-1) / 2K and picks the first patch whose cumulative share of the scores reaches it. Probes and
    order agree with the code of Haurum et al. (JoakimHaurum/TokenReduction). That a probe picks the first level that
    reaches it is the definition of the inverse transform and was not checked against code: both that code and the
    official one pick the nearest level.

    Args:
        scores: See `nearest`.
        valid: See `nearest`.
        probes: See `nearest`.

    Returns:
        The positions of the patches in the given order (B, M), and whether each is picked (B, M).
    """
    sums = _integer_scores(scores, valid).cumsum(dim=1)
    levels = (sums.to(scores.dtype) / sums[:, -1:]).contiguous()
    at = (torch.arange(probes, dtype=levels.dtype, device=levels.device) + 0.5) / probes
    picks = torch.searchsorted(levels, at.expand(levels.shape[0], -1).contiguous()).clamp_max(levels.shape[1] - 1)
    return torch.arange(levels.shape[1], device=levels.device).expand_as(levels), _picked_mask(picks, levels)


def pack(order: Int[Tensor, "b m"], picked: Bool[Tensor, "b m"], slots: int) -> tuple[Tensor, Tensor]:
    """Move the picked positions to the front, in their order, and fill the other slots with padding.

    Args:
        order: Positions of the patches (B, M).
        picked: Whether each is picked (B, M).
        slots: Number of slots.

    Returns:
        Positions (B, slots), and a mask that is False where a slot is padding (B, slots).
    """
    front = (~picked).int().sort(dim=1, stable=True).indices[:, :slots]
    return order.gather(1, front), picked.gather(1, front)


RULES = {"nearest": nearest, "inverse_transform": inverse_transform}


def _integer_scores(scores: Float[Tensor, "b m"], valid: Bool[Tensor, "b m"]) -> Int[Tensor, "b m"]:
    """Scale the scores to integers with a maximum of SCALE; padding gets 0.

    If no score is above 0, all are SCALE. NaN and infinity count as 0. The cumulative sum of integers is exact, and
    therefore the same for any padding and on any device. That of floats is not deterministic on CUDA by default.
    """
    scores = scores.nan_to_num(0.0, 0.0, 0.0) * valid
    highest = scores.amax(dim=1, keepdim=True)
    return (torch.where(highest > 0, scores / highest, valid.to(scores.dtype)) * SCALE).long()


def _picked_mask(picks: Int[Tensor, "b k"], levels: Float[Tensor, "b m"]) -> Bool[Tensor, "b m"]:
    return torch.zeros_like(levels, dtype=torch.bool).scatter(1, picks, True)


def _num_probes(budget: Budget, patches: int) -> int | None:
    """Return the number of probes for a budget; None if nothing is dropped."""
    if budget == "all":
        return None
    if budget is None:
        return patches
    is_number = isinstance(budget, int | float) and not isinstance(budget, bool)
    check(
        is_number and (budget >= 1 if isinstance(budget, int) else 0 < budget <= 1),
        "tokenizer.build.budget",
        "an int >= 1, a float above 0 and at most 1, 'all', or null for as many probes as there are patches",
        budget,
    )
    return budget if isinstance(budget, int) else max(1, round(budget * patches))
