"""Adaptive Token Sampling: as many patches go on as the class token's attention has to be spread over.

Fayyaz et al., "Adaptive Token Sampling for Efficient Vision Transformers", ECCV 2022, sections 3.1 and 3.2, and the
official code, github.com/adaptivetokensampling/ATS. It has no parameters and goes into pretrained models as they are.
"""

from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fewtokens.errors import FewtokensError
from fewtokens.layers.attention import AttentionState
from fewtokens.layers.block import Block, Choice
from fewtokens.tokenizers.base import LayerContext, Tokenizer
from fewtokens.tokens import Tokens

Sample = tuple[Int[Tensor, "b m"], Bool[Tensor, "b m"]]
Budget = int | float | Literal["all"] | None


class ATS(Tokenizer):
    """Samples patches inside the block: scores them before attention is paid for, then lets the sampled ones attend.

    A patch scores (class token's attention, summed over heads) * |its values, heads concatenated|. K probes are laid
    on the cumulative scores, every probe picks one patch, and a patch picked twice goes on once: where attention is
    peaked few are left. Every later stage probes again what the stage before left.

    Nothing is random, in training neither, and an image keeps the same patches alone and in any batch. Images of a
    batch keep different numbers, so the batch is padded, with `Tokens.mask` saying where, to the largest of them.

    In what sense it is differentiable: the choice is a hard gather. Gradients flow through what was kept, that is
    through the survivors' attention, through the keys and values of all patches that they looked at (also of those
    dropped here) and through the residual stream; none flows through scores, cumulative sums or probes, so nothing
    teaches the network to be chosen differently. The official code does the same.

    Where it leaves the official code, all of it on purpose:
        - Minimum and first probe come from an image's own patches. There, padding changes both, and an image in another
          batch keeps other patches: logits differed by 0.49. Ours are those of its images one by one: the patch with
          the lowest score, to which the nearest rule gives level 0, is never picked, where it kept it beside padding.
        - Two patches left: the higher stays; there, both go. One left stays; there, 0/0. All scores zero count as
          equal; there, NaN. At least one patch always goes on.
        - Fewer probes than patches pick from all levels. There, a token limit crashes, and of fewer probes K none can
          pick below the K highest patches.
        - The sort is stable, and attention beside padding is exact, without the official epsilon of 1e-6.

    Args:
        context: Where it stands; it must have a class token.
        rule: "nearest" (official code: sort by score, levels from 0 to 1, evenly spaced probes from the first level
            above 0 to 1, each picks the nearest level) or "inverse_transform" (paper: in the order of the tokens,
            probe (2i-1)/2K picks the first patch at which the cumulative share reaches it).
        budget: Probes K, the most patches that can be left (class and register tokens not counted): an int; a float in
            (0, 1], the share of the patches that the backbone embeds; None, as many as those (official); or "all",
            which drops nothing, so that the model is the plain one.
        static: Keep min(K, patches) slots whatever the images need: shapes then depend on no values. torch.compile and
            torch.export get this by themselves; it costs the compute that padding costs.

    Raises:
        FewtokensError: No class token, or a rule or budget that is none.
    """

    def __init__(
        self,
        context: LayerContext,
        rule: Literal["nearest", "inverse_transform"] = "nearest",
        budget: Budget = None,
        static: bool = False,
    ) -> None:
        super().__init__(context)
        if not context.class_token:
            raise FewtokensError(
                "ATS scores patches by the attention of the class token",
                expected="a backbone with a class token",
                got="one without, which pools its patches",
                fix="set backbone.pool=token, or take a backbone that has one",
            )
        if rule not in RULES:
            raise FewtokensError(
                "ATS samples by one of two rules",
                expected=" or ".join(map(repr, RULES)),
                got=repr(rule),
                fix="set tokenizer.build.rule=nearest",
            )
        self.sample, self.static = RULES[rule], static
        self.probes = _count_probes(budget, context.frames * context.grid[0] * context.grid[1])

    def forward(self, tokens: Tokens, block: Block) -> Tokens:
        """The survivors after the block (B, P + kept, C), padded; order and lattice are lost."""
        if self.probes is None:
            return block(tokens)
        return block.feed_forward(block.attend(tokens, partial(self.choose, tokens))[0])

    @torch.no_grad()
    def choose(self, tokens: Tokens, state: AttentionState) -> Choice:
        """Which patches go on (B, kept), and where that is padding; None where no image needs any."""
        assert self.probes is not None
        prefix = tokens.prefix
        scores = significance(state)[:, prefix:]
        valid = torch.ones_like(scores, dtype=torch.bool) if tokens.mask is None else tokens.mask[:, prefix:]
        order, picked = self.sample(scores, valid, self.probes)
        if self.static or torch.compiler.is_compiling():
            return pack(order, picked, min(self.probes, tokens.num_patches))
        fewest, most = torch.stack(picked.sum(dim=1).aminmax()).tolist()  # the one wait for the device
        index, mask = pack(order, picked, most)
        return index, mask if fewest < most else None


def significance(state: AttentionState) -> Float[Tensor, "b n"]:
    """Scores of all tokens (B, N), float32, not normalised (paper, equation 3), from one row: no N x N matrix."""
    attention = state.attention_rows(1)[:, :, 0].sum(dim=1)
    return attention * torch.linalg.vector_norm(state.value.float(), dim=(1, 3))


def nearest(scores: Float[Tensor, "b m"], valid: Bool[Tensor, "b m"], probes: int) -> Sample:
    """The official rule: evenly spaced probes on sorted cumulative scores pick the nearest level.

    Args:
        scores: Of every patch (B, M), at least 0.
        valid: False where a slot is padding (B, M); at least one of an image is not.
        probes: K.

    Returns:
        The slots by rising score, padding first (B, M), and which of them, in that order, are picked (B, M).
    """
    shares = _shares(scores, valid)
    order = shares.masked_fill(~valid, -1).sort(dim=1, stable=True).indices
    shares = shares.gather(1, order)
    lowest = shares.masked_fill(~valid.gather(1, order), ONE).amin(dim=1, keepdim=True)
    sums = shares.cumsum(dim=1)
    spread = sums[:, -1:] - lowest
    levels = (sums - lowest).to(scores.dtype) / spread.clamp_min(1)  # 0: the lowest patch; < 0: padding
    levels = torch.cat([levels[:, :-1], torch.ones_like(levels[:, -1:])], dim=1)  # so, too, when one patch is left
    return order, _mark(pick_nearest(levels, probes), levels)


def pick_nearest(levels: Float[Tensor, "b m"], probes: int) -> Int[Tensor, "b k"]:
    """Positions (B, K) of the levels, rising (B, M), next to K even probes from the first level above 0 up to 1.

    The lower of two equally near ones. A single probe is at 1.
    """
    first = levels.masked_fill(levels <= 0, 1.0).amin(dim=1, keepdim=True)
    steps = torch.arange(probes, dtype=levels.dtype, device=levels.device) / max(probes - 1, 1)
    at = first + (1 - first) * (steps if probes > 1 else steps + 1)
    above = torch.searchsorted(levels.contiguous(), at).clamp_max(levels.shape[1] - 1)
    below = (above - 1).clamp_min(0)
    return torch.where(at - levels.gather(1, below) <= levels.gather(1, above) - at, below, above)


def inverse_transform(scores: Float[Tensor, "b m"], valid: Bool[Tensor, "b m"], probes: int) -> Sample:
    """The paper's rule (section 3.2): probe (2i-1)/2K picks where the cumulative share, in token order, reaches it.

    Args and returns as of `nearest`, but in the order given.
    """
    sums = _shares(scores, valid).cumsum(dim=1)
    levels = (sums.to(scores.dtype) / sums[:, -1:]).contiguous()
    at = (torch.arange(probes, dtype=levels.dtype, device=levels.device) + 0.5) / probes
    picks = torch.searchsorted(levels, at.expand(levels.shape[0], -1).contiguous()).clamp_max(levels.shape[1] - 1)
    return torch.arange(levels.shape[1], device=levels.device).expand_as(levels), _mark(picks, levels)


def pack(order: Int[Tensor, "b m"], picked: Bool[Tensor, "b m"], slots: int) -> tuple[Tensor, Tensor]:
    """The picked ones first, in order, then others as padding (B, slots); False where it is padding (B, slots)."""
    front = (~picked).int().sort(dim=1, stable=True).indices[:, :slots]
    return order.gather(1, front), picked.gather(1, front)


ONE = 2**40  # as fine as needed: float32 has 24 bits
RULES = {"nearest": nearest, "inverse_transform": inverse_transform}


def _shares(scores: Float[Tensor, "b m"], valid: Bool[Tensor, "b m"]) -> Int[Tensor, "b m"]:
    """Scores of which the highest is ONE, 0 for padding; all ONE where none is above 0. No numbers count as 0.

    Integers, because their cumulative sum is exact: the same whatever padding stands between and on any device, where
    CUDA's of floats is not deterministic and refuses to run under torch.use_deterministic_algorithms.
    """
    scores = scores.nan_to_num(0.0, 0.0, 0.0) * valid
    highest = scores.amax(dim=1, keepdim=True)
    return (torch.where(highest > 0, scores / highest, valid.to(scores.dtype)) * ONE).long()


def _mark(picks: Int[Tensor, "b k"], levels: Float[Tensor, "b m"]) -> Bool[Tensor, "b m"]:
    return torch.zeros_like(levels, dtype=torch.bool).scatter(1, picks, True)


def _count_probes(budget: Budget, patches: int) -> int | None:
    if budget == "all":
        return None
    if budget is None:
        return patches
    number = isinstance(budget, int | float) and not isinstance(budget, bool)
    if not number or (budget < 1 if isinstance(budget, int) else not 0 < budget <= 1):
        raise FewtokensError(
            "The budget of ATS is a number of patches or a share of them",
            expected="an int >= 1, a float 0 < share <= 1, 'all', or null for as many as the backbone embeds",
            got=repr(budget),
            fix="set tokenizer.build.budget=0.5",
        )
    return budget if isinstance(budget, int) else max(1, round(budget * patches))
