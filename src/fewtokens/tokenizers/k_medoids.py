"""K-medoids: cluster the patches, and keep the patch that represents each cluster best.

Marin et al., "Token Pooling in Vision Transformers", 2021 (arXiv 2110.03860; WACV 2023), weighted K-medoids; also in
Haurum et al., "Which Tokens to Use?", 2023 (arXiv 2308.04657). The aim is that of the first paper's abstract: few
tokens from which all can be approximated with the smallest error, found by clustering. `KMedoids` says what exactly is
minimized here; this was not compared with the paper's equations, and no code of its authors was found. The code of
Haurum et al., JoakimHaurum/TokenReduction, was read; `KMedoids` lists the differences.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fewtokens.errors import FewtokensError, check
from fewtokens.layers.attention import AttentionState, autocast_disabled
from fewtokens.layers.block import Block
from fewtokens.tokenizers.base import KeepRate, LayerContext, Selector, num_kept, top_positions
from fewtokens.tokenizers.clustering import Clusters, nearest_center, squared_distances, valid_per_frame
from fewtokens.tokenizers.top_k import class_attention
from fewtokens.tokens import Tokens

Significance = Literal["class", "all"]


class KMedoids(Selector):
    """Clusters the patches inside the block, between attention and MLP, and keeps the medoid of every cluster.

    The medoids minimize the sum of w_i |x_i - nearest medoid|^2, where w_i is the attention that patch i receives. They
    start as the patches with the highest w_i. In each iteration, every patch joins the nearest medoid, and every
    cluster takes the member with the smallest weighted sum of squared distances to the other members. Medoids are
    unchanged patches, not means. The method has no parameters and works in pretrained models. Gradients reach the
    patches that stay, but not the choice. Each frame is clustered on its own.

    Memory: the distances (B, N, N) are built in any case, and with significance "all" the attention matrix of every
    head (B, heads, N, N) as well.

    It differs from the code of Haurum et al. in these ways:
        - The weights default to the attention of the class token, one row of the matrix. There they are the attention
          of all tokens, summed over heads, which is `significance="all"`.
        - It acts after the attention of its own block, so that dropped patches skip the MLP. There it acts between two
          blocks, with the attention of the block before.
        - The cost of a medoid is the sum over its cluster of squared distances, each weighted by the member's w. There
          it is the sum over all patches of unsquared distances, weighted by the candidate's own w.
        - It keeps the share of the patches that reach the place, rounded up. There it is keep_rate to the power of the
          stage, of all patches, rounded down.
        - Sizes are counted (`sizes`).

    Args:
        context: The place in the encoder.
        keep_rate: Number of clusters as a share of the patches of a frame, see `Selector`.
        iterations: Number of times that the medoids are updated (code of Haurum et al.: 3); 0 is top-k by w.
        significance: Source of the weights w_i: attention of the "class" token, or of "all" tokens (the paper; this
            costs another N x N x C multiply-adds). None: "class" if there is a class token, otherwise "all".
        sizes: Count how many patches a medoid represents, as ToMe does, so that sizes weigh in attention and pooling.
            False, as in the paper and the code, counts them only if an earlier tokenizer does.
    """

    def __init__(
        self,
        context: LayerContext,
        keep_rate: KeepRate = 0.5,
        iterations: int = 3,
        significance: Significance | None = None,
        sizes: bool = True,
    ) -> None:
        super().__init__(context, keep_rate)
        check(iterations >= 0, "tokenizer.build.iterations", "an int >= 0", iterations)
        if significance not in ("class", "all", None) or (significance == "class" and not context.class_token):
            raise FewtokensError(
                "`tokenizer.build.significance` must be 'all', null, or 'class' if the backbone has a class token, got "
                f"{significance!r} with {'a' if context.class_token else 'no'} class token."
            )
        self.iterations, self.sizes = iterations, sizes
        self.significance = significance or ("class" if context.class_token else "all")

    def forward(self, tokens: Tokens, block: Block) -> Tokens:
        """Compute attention, select the medoids, and run the MLP."""
        attended, state = block.attend(tokens)
        count = tokens.num_patches // tokens.frames
        if num_kept(count, self.keep_rate) < count:
            attended = self.choose(attended, self.weights(attended, state))
        del state  # to free its memory before the MLP, see top_k
        return block.feed_forward(attended)

    @torch.no_grad()
    def weights(self, tokens: Tokens, state: AttentionState) -> Float[Tensor, "b m"]:
        """Return the attention that every patch receives (B, N): the mean over heads, summed over its source tokens."""
        if self.significance == "class":
            return class_attention(state, tokens.prefix)
        attention = state.attention_rows(tokens.x.shape[1]).mean(dim=1)[:, :, tokens.prefix :]
        return (attention if tokens.mask is None else attention * tokens.mask[..., None]).sum(dim=1)

    def choose(self, tokens: Tokens, weights: Float[Tensor, "b m"]) -> Tokens:
        """Keep only the medoids, by the patches' weights (B, N)."""
        patches = tokens.per_frame
        weights = weights.reshape(patches.shape[:2])
        clusters = medoids(patches, weights, self.keep_rate, self.iterations, valid_per_frame(tokens))
        start = torch.arange(tokens.frames, device=patches.device)[:, None] * patches.shape[1]
        index = (clusters.centers.unflatten(0, (-1, tokens.frames)) + start).flatten(1)
        mask = None if clusters.mask is None else clusters.mask.reshape(index.shape)
        sizes = clusters.weights(tokens).sum(dim=2) if self.sizes or tokens.size is not None else None
        return clusters.describe(tokens.select(index, mask), tokens, sizes)


@torch.no_grad()
def medoids(
    x: Float[Tensor, "b m c"],
    weights: Float[Tensor, "b m"],
    keep_rate: float,
    iterations: int,
    valid: Bool[Tensor, "b m"] | None = None,
) -> Clusters:
    """Cluster patches by weighted K-medoids, at least in float32.

    Args:
        x: Features (B, N, C).
        weights: Weight of every patch (B, N), at least 0.
        keep_rate: Number of clusters as a share of the valid patches of each sample.
        iterations: Number of times that the medoids are updated.
        valid: False where a patch is padding (B, N); None without padding.
    """
    squared = squared_distances(x)
    weights = weights if valid is None else weights * valid
    centers, mask = top_positions(weights, keep_rate, valid)
    slots = torch.arange(centers.shape[1], device=x.device)
    slot = nearest_center(squared, centers, mask)
    for _ in range(iterations):
        member = slot[..., None] == slots
        with autocast_disabled(x.device):
            costs = squared @ (weights[..., None] * member).to(squared.dtype)
        candidate = member if valid is None else member & valid[..., None]
        best = costs.masked_fill(~candidate, float("inf")).argmin(dim=1)
        centers = best if mask is None else torch.where(mask, best, centers)
        slot = nearest_center(squared, centers, mask)
    return Clusters(centers, slot, mask)
