"""ToMe: merge the most similar tokens, a few in every block.

Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023 (arXiv 2210.09461), section 3. Written from the paper and
from what the official code (facebookresearch/ToMe) computes, whose numbers are in tests/golden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fewtokens.errors import FewtokensError, check
from fewtokens.layers.block import Block
from fewtokens.tokenizers.base import LayerContext, Tokenizer, check_no_padding, highest
from fewtokens.tokens import Tokens


@dataclass(frozen=True)
class Matching:
    """A plan of which patches to merge into which, as positions among the patches.

    Args:
        keep: The patches that stay, in their new order (B, N-r).
        source: The patches that are merged away (B, r).
        target: Index into `keep` of the token that each of them is merged into (B, r).
    """

    keep: Int[Tensor, "b k"]
    source: Int[Tensor, "b r"]
    target: Int[Tensor, "b r"]

    def unmerge(self, patches: Float[Tensor, "b k c"]) -> Float[Tensor, "b m c"]:
        """Copy the merged patches (B, N-r, C) back to all N positions that are part of them (B, N, C)."""
        width = patches.shape[2]
        keep, source, target = (t[..., None].expand(-1, -1, width) for t in (self.keep, self.source, self.target))
        empty = patches.new_empty(patches.shape[0], keep.shape[1] + source.shape[1], width)
        return empty.scatter(1, keep, patches).scatter(1, source, patches.gather(1, target))


class ToMe(Tokenizer):
    """Merges the r most similar pairs of patches into their means, inside a block, between attention and MLP.

    Similarity is the cosine of the keys, averaged over heads. Means are weighted by size, the number of patches that a
    token represents, in this and in all later blocks, and so is mean pooling before the head, as in the official code
    for MAE. The method has no parameters and works in pretrained models. Class, distillation and register tokens are
    never merged.

    The pairs are found here, by `match`. `Tokens.merge` replaces them by their means and adds up their sizes,
    `Tokens.bias` turns sizes into the bias of attention (log(size)), and `Tokens.mean` weighs the pooling by them.

    Args:
        context: The place in the encoder; the official code uses every block.
        r: Number of tokens that each block merges away (at most half of the patches), or a list with one number for
            each block in `tokenizer.at`, to which zeros are appended.
        inflection: Slope of r over the blocks, from -1 to 1: 0 is constant, -1 decreases from 2r to 0, and 1 increases
            from 0 to 2r.
        proportional: Add log(size) to the attention logits, in these and in all later blocks, so that a token of s
            patches counts s times. According to the paper, this is off for MAE models without fine-tuning.
    """

    def __init__(
        self, context: LayerContext, r: int | Sequence[int] = 8, inflection: float = 0.0, proportional: bool = True
    ) -> None:
        super().__init__(context)
        self.r = schedule(r, inflection, context.stages)[context.stage]
        self.proportional = proportional

    def forward(self, tokens: Tokens, block: Block) -> Tokens:
        """Compute attention, merge tokens, and run the MLP."""
        check_no_padding(self, tokens)
        if tokens.size_bias != self.proportional:
            tokens = replace(tokens, size_bias=self.proportional)
        tokens, state = block.attend(tokens)
        r = num_merged(self.r, tokens.num_patches)
        if r:
            matching = match(state.key.mean(dim=1), r, tokens.prefix)
            tokens = tokens.merge(matching.keep, matching.source, matching.target)
        del state  # to free its memory before the MLP, see top_k
        return block.feed_forward(tokens)


def num_merged(r: int, num_patches: int) -> int:
    """Return r, or half of the patches if that is less, since one half is merged into the other."""
    return min(r, num_patches // 2)


@torch.no_grad()
def match(metric: Float[Tensor, "b n d"], r: int, prefix: int) -> Matching:
    """Match similar patches (paper, section 3, "Bipartite Soft Matching").

    Tokens at even positions form set A and those at odd positions set B, where the prefix counts as positions but
    belongs to neither. Every token in A finds the most similar one in B by cosine. The r most similar pairs are merged;
    several tokens of A may be merged into the same token of B.

    Args:
        metric: Features to compare (B, P+N, D), including the prefix.
        r: Number of pairs, at most N // 2.
        prefix: Number P of leading tokens that are not merged.

    Returns:
        The plan, in which the rest of A comes before B. As in the official code, the rest of A is in its order if there
        is a prefix, and by decreasing similarity otherwise. Of equally similar tokens, the first positions are taken.
    """
    # The default epsilon of 1e-12 is 0 in float16, where it would turn a zero vector into NaN.
    metric = F.normalize(metric, dim=-1, eps=max(1e-12, torch.finfo(metric.dtype).tiny))
    first_a, first_b = prefix + prefix % 2, prefix + 1 - prefix % 2
    scores = metric[:, first_a::2] @ metric[:, first_b::2].transpose(1, 2)
    best, partner = scores.max(dim=2)
    order = highest(best, best.shape[1])
    merged, rest = order[:, :r], order[:, r:]
    if prefix:
        rest = rest.sort(dim=1).values
    b = torch.arange(scores.shape[2], device=metric.device).expand(metric.shape[0], -1)
    start_a, start_b = first_a - prefix, first_b - prefix
    keep = torch.cat([2 * rest + start_a, 2 * b + start_b], dim=1)
    return Matching(keep, 2 * merged + start_a, partner.gather(1, merged) + rest.shape[1])


def schedule(r: int | Sequence[int], inflection: float, stages: int) -> list[int]:
    """Return how many tokens each stage merges away.

    As `parse_r` of the official code: from int(r (1 - inflection)) in equal steps to 2r minus that number, each
    truncated to an int. For 12 stages, r=8 and inflection=-1 this is 16 14 13 11 10 8 7 5 4 2 1 0. For one stage, where
    that code divides by zero, it is r.

    Raises:
        FewtokensError: A number is negative, the list is too long, or a list comes with a slope.
    """
    check(-1 <= inflection <= 1, "tokenizer.build.inflection", "between -1 and 1", inflection)
    numbers = [r] if isinstance(r, int) else list(r)
    if not all(n >= 0 for n in numbers) or len(numbers) > stages:
        raise FewtokensError(
            f"`tokenizer.build.r` must be an int >= 0, or a list of at most {stages} of them, one for each block in "
            f"`tokenizer.at`, got {r}."
        )
    if not isinstance(r, int):
        check(inflection == 0, "tokenizer.build.inflection", "0 if tokenizer.build.r is a list", inflection)
        return numbers + [0] * (stages - len(numbers))
    if stages == 1:
        return [r]
    low = int(r * (1 - inflection))
    step = (2 * r - 2 * low) / (stages - 1)
    return [int(low + step * i) for i in range(stages)]
