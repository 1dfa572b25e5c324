"""ToMe: merge the most similar tokens, a few in every block.

Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023 (arXiv 2210.09461), section 3. Written from what the
paper says and the official code computes; its numbers are in tests/golden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fewtokens.errors import FewtokensError
from fewtokens.layers.block import Block
from fewtokens.tokenizers.base import LayerContext, Tokenizer
from fewtokens.tokens import Tokens


@dataclass(frozen=True)
class Matching:
    """Which patches merge into which, as positions among the patches.

    Args:
        keep: The patches that stay, in their new order (B, N-r).
        source: The patches that go (B, r).
        target: For each of them its slot in `keep` (B, r).
    """

    keep: Int[Tensor, "b k"]
    source: Int[Tensor, "b r"]
    target: Int[Tensor, "b r"]

    def unmerge(self, patches: Float[Tensor, "b k c"]) -> Float[Tensor, "b m c"]:
        """The merged patches (B, N-r, C) back at all N positions: every patch gets the token that it is part of."""
        width = patches.shape[2]
        keep, source, target = (t[..., None].expand(-1, -1, width) for t in (self.keep, self.source, self.target))
        empty = patches.new_empty(patches.shape[0], keep.shape[1] + source.shape[1], width)
        return empty.scatter(1, keep, patches).scatter(1, source, patches.gather(1, target))


class ToMe(Tokenizer):
    """Inside a block, between attention and MLP, the r most similar pairs of patches merge into their means.

    Similar are those with similar keys, mean over the heads. Sizes are counted: means are weighted by them, and where
    `proportional` is set attention too (a token of s patches weighs s times, log(s) added to its logits). It has no
    parameters and works off the shelf. Class, distillation and register tokens never merge.

    Args:
        context: Where it stands; the official code stands in every block.
        r: Tokens that each place merges away (at most half of the patches), or a list with one number for each context,
            filled up with zeros.
        inflection: Slope of r over the places, -1 to 1: 0 is constant, -1 falls from 2r to 0, 1 rises from 0 to 2r.
        proportional: Sizes count in attention, in the blocks where it stands. Paper: off for MAE models off the shelf.
    """

    def __init__(
        self, context: LayerContext, r: int | Sequence[int] = 8, inflection: float = 0.0, proportional: bool = True
    ) -> None:
        super().__init__(context)
        self.r = schedule(r, inflection, context.stages)[context.stage]
        self.proportional = proportional

    def forward(self, tokens: Tokens, block: Block) -> Tokens:
        """Attention, the merging, the MLP."""
        if tokens.mask is not None:
            raise FewtokensError(
                "ToMe merges as many patches of every image, so none may be padding",
                expected="tokens without padding",
                got="padded tokens, from an adaptive tokenizer before it",
                fix="place it first, or leave the adaptive tokenizer out",
            )
        size = tokens.size
        tokens, state = block.attend(tokens if self.proportional else replace(tokens, size=None))
        tokens = replace(tokens, size=size)
        r = clipped(self.r, tokens.num_patches)
        if r:
            matching = match(state.key.mean(dim=1), r, tokens.prefix)
            tokens = tokens.merge(matching.keep, matching.source, matching.target)
        del state  # memory, see top_k
        return block.feed_forward(tokens)


def clipped(r: int, num_patches: int) -> int:
    """r, or half of the patches if that is less: merging goes from one half into the other."""
    return min(r, num_patches // 2)


@torch.no_grad()
def match(metric: Float[Tensor, "b n d"], r: int, prefix: int) -> Matching:
    """Bipartite soft matching (paper, section 3, "Bipartite Soft Matching").

    Tokens at even positions are set A, at odd ones set B, the prefix counted along but in neither. Every A finds its
    most similar B by cosine; the r most similar pairs are to merge, several A perhaps into one B.

    Args:
        metric: What is compared (B, P+N, D), the prefix included.
        r: Pairs, at most N // 2.
        prefix: P, the leading tokens that stay out.

    Returns:
        What stays is the rest of A, then B: as in the official code, the rest of A in its order if there is a prefix,
        and else by falling similarity. Of equally similar ones the first positions win.
    """
    metric = F.normalize(metric, dim=-1)  # a zero vector stays one, similar to nothing, and gives no NaN
    first_a, first_b = prefix + prefix % 2, prefix + 1 - prefix % 2
    scores = metric[:, first_a::2] @ metric[:, first_b::2].transpose(1, 2)
    best, partner = scores.max(dim=2)
    order = best.argsort(dim=1, descending=True, stable=True)
    merged, rest = order[:, :r], order[:, r:]
    if prefix:
        rest = rest.sort(dim=1).values
    b = torch.arange(scores.shape[2], device=metric.device).expand(metric.shape[0], -1)
    start_a, start_b = first_a - prefix, first_b - prefix
    keep = torch.cat([2 * rest + start_a, 2 * b + start_b], dim=1)
    return Matching(keep, 2 * merged + start_a, partner.gather(1, merged) + rest.shape[1])


def schedule(r: int | Sequence[int], inflection: float, places: int) -> list[int]:
    """How many tokens each of the places merges away.

    From int(r (1 - inflection)) in equal steps to the mirror value 2r - that, each truncated to a whole number. For 12
    places, r=8 and inflection=-1: 16 14 13 11 10 8 7 5 4 2 1 0.

    Raises:
        FewtokensError: Negative numbers, more numbers than places, or a slope for a list.
    """
    numbers = [r] if isinstance(r, int) else list(r)
    fits = all(n >= 0 for n in numbers) and len(numbers) <= places and -1 <= inflection <= 1
    if not fits or (inflection and not isinstance(r, int)):
        raise FewtokensError(
            "ToMe merges r tokens in each place",
            expected=f"r >= 0 with -1 <= inflection <= 1, or a list of at most {places} such r without inflection",
            got=f"r={r}, inflection={inflection}",
            fix="set tokenizer.build.r=8, or tokenizer.build.r=[16,8]",
        )
    if not isinstance(r, int):
        return numbers + [0] * (places - len(numbers))
    if places == 1:
        return [r]
    low = int(r * (1 - inflection))
    step = (2 * r - 2 * low) / (places - 1)
    return [int(low + step * i) for i in range(places)]
