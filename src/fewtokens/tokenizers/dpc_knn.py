"""DPC-KNN: cluster the patches around peaks of density, and merge each cluster into one token.

Du, Ding and Jia, "Study on density peaks clustering based on k-nearest neighbors and principal component analysis",
Knowledge-Based Systems 2016; for vision tokens Zeng et al., "Not All Tokens Are Equal: Human-centric Visual Analysis
via Token Clustering Transformer" (TCFormer), CVPR 2022 (arXiv 2204.08680); before the blocks of a ViT, Haurum et al.,
"Which Tokens to Use?", 2023 (arXiv 2308.04657). Checked against the code of the latter two, zengwang430521/TCFormer and
JoakimHaurum/TokenReduction, which agree. The papers' equations are from memory.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fewtokens.errors import check
from fewtokens.layers.attention import autocast_disabled
from fewtokens.layers.block import Block
from fewtokens.tokenizers.base import KeepRate, LayerContext, Selector, num_kept, top_positions
from fewtokens.tokenizers.clustering import Clusters, nearest_center, squared_distances, valid_per_frame
from fewtokens.tokens import Tokens


class DPCKNN(Selector):
    """Clusters the patches by their features before the block, and merges every cluster into its mean.

    A patch is dense if its nearest neighbors are near. Cluster centers are dense patches that are far from every denser
    one, and every patch joins the nearest center. The method has no parameters and works in pretrained models.
    Gradients reach all patches through the means, but not the clustering. Each frame is clustered on its own.

    It differs from the official code in two ways: that code adds noise to the densities so that no two are equal, while
    here the first of equal ones counts as denser; and TCFormer weights the means by a learned score, which is not
    implemented here.

    Args:
        context: The place in the encoder.
        keep_rate: Number of clusters as a share of the patches of a frame, see `Selector`.
        neighbors: Number k of nearest patches in a density, including the patch itself (official code: 5).
        sizes: Count how many patches a token represents, as ToMe does, so that sizes weigh in later means, in attention
            and in pooling. False, as in the official code, counts them only if an earlier tokenizer does.
    """

    def __init__(
        self, context: LayerContext, keep_rate: KeepRate = 0.5, neighbors: int = 5, sizes: bool = True
    ) -> None:
        super().__init__(context, keep_rate)
        check(neighbors >= 1, "tokenizer.build.neighbors", "an int >= 1", neighbors)
        self.neighbors, self.sizes = neighbors, sizes

    def forward(self, tokens: Tokens, block: Block) -> Tokens:
        """Merge the clusters and run the block."""
        return block(self.merge(tokens))

    def merge(self, tokens: Tokens) -> Tokens:
        """Return one patch token per cluster, in the order of the centers. The result has no grid."""
        patches = tokens.per_frame
        count = patches.shape[1]
        if num_kept(count, self.keep_rate) == count:
            return tokens
        clusters = density_peaks(patches, self.keep_rate, self.neighbors, valid_per_frame(tokens))
        weights = clusters.weights(tokens)
        sizes = weights.sum(dim=2)
        wide = torch.promote_types(patches.dtype, torch.float32)  # so that a cluster of one patch leaves it unchanged
        shares = weights.to(wide) / sizes.clamp_min(1)[..., None]
        with autocast_disabled(patches.device):
            few = tokens.resample_per_frame(shares @ patches.to(wide), shares)
        return clusters.describe(few, tokens, sizes if self.sizes or tokens.size is not None else None)


@torch.no_grad()
def density_peaks(
    x: Float[Tensor, "b m c"], keep_rate: float, neighbors: int, valid: Bool[Tensor, "b m"] | None = None
) -> Clusters:
    """Cluster patches by DPC-KNN, at least in float32.

    With d_ij = |x_i - x_j| / sqrt(C), the density of patch i is rho_i = exp(-mean of d_ij^2 over its k nearest patches,
    including itself). Its gap delta_i is the smallest d_ij to a denser patch, or for the densest patch the largest d_ij
    to any. Centers are the patches with the largest rho_i * delta_i. These are compared as logarithms, which do not
    underflow. Of equal ones, the first are taken.

    Args:
        x: Features (B, N, C).
        keep_rate: Number of clusters as a share of the valid patches of each sample.
        neighbors: Number k; all patches if there are fewer.
        valid: False where a patch is padding (B, N), which is neither a neighbor nor a center; None without padding.
    """
    squared = squared_distances(x) / x.shape[2]
    real = torch.ones_like(squared[:, 0], dtype=torch.bool) if valid is None else valid
    density = log_densities(squared, real, neighbors)
    gaps = squared_gaps(squared, real, density)
    scores = torch.where(gaps > 0, density + 0.5 * gaps.log(), torch.finfo(gaps.dtype).min)
    centers, mask = top_positions(scores, keep_rate, valid)
    return Clusters(centers, nearest_center(squared, centers, mask), mask)


def log_densities(squared: Float[Tensor, "b m m"], valid: Bool[Tensor, "b m"], neighbors: int) -> Float[Tensor, "b m"]:
    """Return the logarithms of the densities (B, N), from squared distances (B, N, N)."""
    count = min(neighbors, squared.shape[2])
    near = squared.masked_fill(~valid[:, None], float("inf")).topk(count, dim=2, largest=False).values
    total = near.masked_fill(near == float("inf"), 0).sum(dim=2)
    return -total / valid.sum(dim=1, keepdim=True).clamp(1, count)


def squared_gaps(
    squared: Float[Tensor, "b m m"], valid: Bool[Tensor, "b m"], density: Float[Tensor, "b m"]
) -> Float[Tensor, "b m"]:
    """Return the squared distance of each patch to the nearest denser one (B, N); for the densest, to the farthest."""
    position = torch.arange(squared.shape[1], device=squared.device)
    mine, theirs = density[:, :, None], density[:, None]
    denser = (theirs > mine) | (theirs == mine) & (position < position[:, None])
    denser = denser & valid[:, None]
    gaps = squared.masked_fill(~denser, float("inf")).amin(dim=2)
    return torch.where(denser.any(dim=2), gaps, squared.masked_fill(~valid[:, None], 0).amax(dim=2))
