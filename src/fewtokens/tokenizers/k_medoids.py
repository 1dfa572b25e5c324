"""K-medoids: of every cluster of patches the one that stands best for it, weighted by attention.

Marin et al., "Token Pooling in Vision Transformers", 2021 (arXiv 2110.03860; WACV 2023), its weighted K-medoids; also
in Haurum et al., "Which Tokens to Use?", 2023 (2308.04657). Objective and weights of the paper are from memory and a
summary; code by its authors was not found. That of Haurum et al. (JoakimHaurum/TokenReduction) was read.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fewtokens.errors import FewtokensError
from fewtokens.layers.attention import AttentionState
from fewtokens.layers.block import Block
from fewtokens.tokenizers.base import LayerContext, Selector, highest, share, without_autocast
from fewtokens.tokenizers.dpc_knn import Clusters, nearest, squared_distances
from fewtokens.tokenizers.top_k import class_attention
from fewtokens.tokens import Tokens

Significance = Literal["class", "all"]


class KMedoids(Selector):
    """Inside a block, between attention and MLP, the patches are clustered, and the medoid of every cluster stays.

    The medoids are to make the sum of w_i |x_i - nearest medoid|^2 small, w_i the attention that patch i gets. They
    start as the patches of the highest w_i; then, over and over, every patch joins the nearest medoid and every cluster
    takes the member with the least weighted sum of squared distances to the others. Medoids are patches as they are, no
    means. It has no parameters and works off the shelf; gradients reach what stays, and not the choice. Frames are
    clustered one by one, and stay frames.

    Paper and code cluster after the whole block, with its attention, which here would be inside the next one: this
    saves the MLP of the patches that go. The code of Haurum et al. multiplies the weight of the candidate, not those of
    the members, and sums over all patches, not the cluster's, of distances that are not squared.

    Args:
        context: Where it stands.
        keep_rate: Clusters as a share of the patches of a frame, rounded up.
        iterations: How often medoids are chosen anew (code: 3); 0 is top-k by w.
        significance: w_i from the "class" token's attention, a row, or from that of "all" tokens (paper; it costs
            another N x N x C multiply-adds). None: the class token's where there is one.
        sizes: Count how many patches a medoid stands for, as ToMe does: sizes weigh in attention and in pooling. False,
            as in paper and code, leaves them out, unless an earlier tokenizer has counted some.
    """

    def __init__(
        self,
        context: LayerContext,
        keep_rate: float = 0.5,
        iterations: int = 3,
        significance: Significance | None = None,
        sizes: bool = True,
    ) -> None:
        super().__init__(context, keep_rate)
        if iterations < 0:
            raise FewtokensError(
                "KMedoids chooses its medoids anew a number of times",
                expected="iterations >= 0",
                got=iterations,
                fix="set tokenizer.build.iterations=3",
            )
        if significance not in ("class", "all", None) or (significance == "class" and not context.class_token):
            raise FewtokensError(
                "KMedoids weighs patches by the attention that they get",
                expected="from 'all' tokens, or from the 'class' token of a backbone that has one",
                got=f"significance={significance!r}, {'a' if context.class_token else 'no'} class token",
                fix="set tokenizer.build.significance=null, which takes what there is",
            )
        self.iterations, self.sizes = iterations, sizes
        self.significance = significance or ("class" if context.class_token else "all")

    def forward(self, tokens: Tokens, block: Block) -> Tokens:
        """Attention, the clustering, the MLP."""
        attended, state = block.attend(tokens)
        count = tokens.num_patches // tokens.frames
        if share(count, self.keep_rate) < count:
            attended = self.choose(attended, self.weights(attended, state))
        del state  # memory, see top_k
        return block.feed_forward(attended)

    @torch.no_grad()
    def weights(self, tokens: Tokens, state: AttentionState) -> Float[Tensor, "b m"]:
        """What attention every patch gets (B, N), the mean over heads, summed over the tokens that it comes from."""
        if self.significance == "class":
            return class_attention(state, tokens.prefix)
        attention = state.attention_rows(tokens.x.shape[1]).mean(dim=1)[:, :, tokens.prefix :]
        return (attention if tokens.mask is None else attention * tokens.mask[..., None]).sum(dim=1)

    def choose(self, tokens: Tokens, weights: Float[Tensor, "b m"]) -> Tokens:
        """The record with the medoids alone, by weights (B, N)."""
        patches = tokens.per_frame
        valid = None if tokens.mask is None else tokens.mask[:, tokens.prefix :].reshape(patches.shape[:2])
        found = medoids(patches, weights.reshape(patches.shape[:2]), self.keep_rate, self.iterations, valid)
        start = torch.arange(tokens.frames, device=patches.device)[:, None] * patches.shape[1]
        index = (found.centres.unflatten(0, (-1, tokens.frames)) + start).flatten(1)
        mask = None if found.mask is None else found.mask.reshape(index.shape)
        sizes = found.weights(tokens).sum(dim=2) if self.sizes or tokens.size is not None else None
        return found.describe(tokens.select(index, mask), tokens, sizes)


@torch.no_grad()
def medoids(
    x: Float[Tensor, "b m c"],
    weights: Float[Tensor, "b m"],
    keep_rate: float,
    iterations: int,
    valid: Bool[Tensor, "b m"] | None = None,
) -> Clusters:
    """Clusters by weighted K-medoids, in float32 at least.

    Args:
        x: Features (B, N, C).
        weights: Of every patch (B, N), at least 0.
        keep_rate: Clusters as a share of the patches, of every sample's own valid ones.
        iterations: How often medoids are chosen anew.
        valid: False where a patch is padding (B, N).
    """
    squared = squared_distances(x)
    weights = weights if valid is None else weights * valid
    centres, mask = highest(weights, keep_rate, valid)
    slots = torch.arange(centres.shape[1], device=x.device)
    slot = nearest(squared, centres, mask)
    for _ in range(iterations):
        member = slot[..., None] == slots
        with without_autocast(x.device):
            costs = squared @ (weights[..., None] * member).to(squared.dtype)
        candidate = member if valid is None else member & valid[..., None]
        best = costs.masked_fill(~candidate, float("inf")).argmin(dim=1)
        centres = best if mask is None else torch.where(mask, best, centres)
        slot = nearest(squared, centres, mask)
    return Clusters(centres, slot, mask)
