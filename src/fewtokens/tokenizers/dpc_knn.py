"""DPC-KNN: clusters around peaks of density, each merged into one token.

Du, Ding and Jia, "Study on density peaks clustering based on k-nearest neighbors and principal component analysis",
Knowledge-Based Systems 2016; for vision tokens Zeng et al., "Not All Tokens Are Equal: Human-centric Visual Analysis
via Token Clustering Transformer" (TCFormer), CVPR 2022 (arXiv 2204.08680), and, in front of a ViT's blocks, Haurum et
al., "Which Tokens to Use?", 2023 (2308.04657). Checked against the code of both, zengwang430521/TCFormer and
JoakimHaurum/TokenReduction, which are the same here; the papers' equations are from memory.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fewtokens.errors import FewtokensError
from fewtokens.layers.block import Block
from fewtokens.tokenizers.base import LayerContext, Selector, highest, share, without_autocast
from fewtokens.tokens import Tokens


@dataclass(frozen=True)
class Clusters:
    """Which patches of a sample, or of a frame, belong together.

    Args:
        centres: One patch of each cluster, as positions among the patches (B, K).
        slot: For every patch the cluster that it is in (B, N).
        mask: False where a slot of `centres` is padding (B, K); None where all are real.
    """

    centres: Int[Tensor, "b k"]
    slot: Int[Tensor, "b m"]
    mask: Bool[Tensor, "b k"] | None

    def weights(self, tokens: Tokens) -> Float[Tensor, "b k m"]:
        """What every patch counts in every cluster (B, K, N): its size in its own, nothing where it is padding."""
        own = self.slot[:, None] == torch.arange(self.centres.shape[1], device=self.slot.device)[:, None]
        size = torch.ones_like(tokens.x[..., 0], dtype=torch.float32) if tokens.size is None else tokens.size
        size = size if tokens.mask is None else size * tokens.mask
        return own * size[:, tokens.prefix :].reshape(self.slot.shape)[:, None]

    def describe(self, few: Tokens, tokens: Tokens, sizes: Float[Tensor, "b k"] | None) -> Tokens:
        """`few`, one token per cluster of `tokens`, with its frames, and padding and sizes of the clusters (B, K)."""

        def whole(values: Tensor) -> Tensor:
            lead = values.new_ones(tokens.x.shape[0], tokens.prefix)
            return torch.cat([lead, values.reshape(lead.shape[0], -1)], dim=1)

        mask = None if self.mask is None else whole(self.mask)
        size = None if sizes is None else whole(sizes.clamp_min(1))  # a slot of padding holds nothing
        return replace(few, frames=tokens.frames, size=size, mask=mask)


class DPCKNN(Selector):
    """Before a block, the patches are clustered by their features, and every cluster becomes its mean.

    A patch with many near neighbours is dense; one that is dense and far from everything denser is a centre; every
    patch joins the nearest centre. It has no parameters and works off the shelf; gradients reach all patches through
    the means, and not the clustering. Frames are clustered one by one, and stay frames.

    Where it leaves the official code: that adds noise to the densities so that no two are equal, where here the first
    of equals counts as denser; TCFormer weights the means by a learned score of every token, which is left out.

    Args:
        context: Where it stands.
        keep_rate: Clusters as a share of the patches of a frame, rounded up.
        neighbours: k, the patches that a density is taken over, itself among them (official code: 5).
        sizes: Count how many patches a token stands for, as ToMe does: sizes weigh in later means, in attention and in
            pooling. False, as in the official code, leaves them out, unless an earlier tokenizer has counted some.
    """

    def __init__(self, context: LayerContext, keep_rate: float = 0.5, neighbours: int = 5, sizes: bool = True) -> None:
        super().__init__(context, keep_rate)
        if neighbours < 1:
            raise FewtokensError(
                "DPCKNN takes a density over neighbours",
                expected="neighbours >= 1",
                got=neighbours,
                fix="set tokenizer.build.neighbours=5",
            )
        self.neighbours, self.sizes = neighbours, sizes

    def forward(self, tokens: Tokens, block: Block) -> Tokens:
        """Cluster and merge, then the block."""
        return block(self.merge(tokens))

    def merge(self, tokens: Tokens) -> Tokens:
        """The record with one patch token per cluster, in the order of the centres; the lattice is lost."""
        patches = tokens.per_frame
        count = patches.shape[1]
        if share(count, self.keep_rate) == count:
            return tokens
        valid = None if tokens.mask is None else tokens.mask[:, tokens.prefix :].reshape(patches.shape[:2])
        clusters = density_peaks(patches, self.keep_rate, self.neighbours, valid)
        weights = clusters.weights(tokens)
        sizes = weights.sum(dim=2)
        wide = torch.promote_types(patches.dtype, torch.float32)  # a lone patch is to come through as it is
        shares = weights.to(wide) / sizes.clamp_min(1)[..., None]
        with without_autocast(patches.device):
            few = tokens.resample_per_frame(shares @ patches.to(wide), shares)
        return clusters.describe(few, tokens, sizes if self.sizes or tokens.size is not None else None)


@torch.no_grad()
def density_peaks(
    x: Float[Tensor, "b m c"], keep_rate: float, neighbours: int, valid: Bool[Tensor, "b m"] | None = None
) -> Clusters:
    """Clusters by DPC-KNN, in float32 at least.

    With d_ij = |x_i - x_j| / sqrt(C), the density of patch i is rho_i = exp(-mean of d_ij^2 over its k nearest, itself
    among them), and delta_i the least d_ij to a denser patch, or for the densest the greatest to any. Centres are the
    patches of the greatest rho_i delta_i, compared by logarithms, which do not run into zero. Of equal ones the first.

    Args:
        x: Features (B, N, C).
        keep_rate: Clusters as a share of the patches, of every sample's own valid ones.
        neighbours: k; of fewer patches all.
        valid: False where a patch is padding (B, N), which is in no neighbourhood and no centre.
    """
    squared = squared_distances(x) / x.shape[2]
    real = torch.ones_like(squared[:, 0], dtype=torch.bool) if valid is None else valid
    density = log_densities(squared, real, neighbours)
    gaps = squared_gaps(squared, real, density)
    scores = torch.where(gaps > 0, density + 0.5 * gaps.log(), torch.finfo(gaps.dtype).min)
    centres, mask = highest(scores, keep_rate, valid)
    return Clusters(centres, nearest(squared, centres, mask), mask)


def log_densities(squared: Float[Tensor, "b m m"], valid: Bool[Tensor, "b m"], neighbours: int) -> Float[Tensor, "b m"]:
    """Logarithms of the densities (B, N), from squared distances."""
    count = min(neighbours, squared.shape[2])
    near = squared.masked_fill(~valid[:, None], float("inf")).topk(count, dim=2, largest=False).values
    total = near.masked_fill(near == float("inf"), 0).sum(dim=2)
    return -total / valid.sum(dim=1, keepdim=True).clamp(1, count)


def squared_gaps(
    squared: Float[Tensor, "b m m"], valid: Bool[Tensor, "b m"], density: Float[Tensor, "b m"]
) -> Float[Tensor, "b m"]:
    """Squared distances (B, N) to the nearest denser patch, for the densest to the farthest of all."""
    position = torch.arange(squared.shape[1], device=squared.device)
    mine, theirs = density[:, :, None], density[:, None]
    denser = (theirs > mine) | (theirs == mine) & (position < position[:, None])
    denser = denser & valid[:, None]
    gaps = squared.masked_fill(~denser, float("inf")).amin(dim=2)
    return torch.where(denser.any(dim=2), gaps, squared.masked_fill(~valid[:, None], 0).amax(dim=2))


def squared_distances(x: Float[Tensor, "b m c"]) -> Float[Tensor, "b m m"]:
    """Between all patches of a sample (B, N, N), in float32 at least; never below 0, and 0 between equal patches."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    with without_autocast(x.device):
        products = x @ x.transpose(1, 2)
    norms = products.diagonal(dim1=1, dim2=2)  # not x*x, whose rounding differs: equal patches would be apart
    return (norms[:, :, None] + norms[:, None] - 2 * products).clamp_min(0)


def nearest(
    distances: Float[Tensor, "b m m"], centres: Int[Tensor, "b k"], mask: Bool[Tensor, "b k"] | None
) -> Int[Tensor, "b m"]:
    """For every patch the slot (B, N) of its nearest centre, of equally near ones the first; a centre has its own."""
    to_centres = distances.gather(2, centres[:, None].expand(-1, distances.shape[1], -1))
    own = centres[:, None] == torch.arange(distances.shape[1], device=centres.device)[:, None]
    to_centres = to_centres.masked_fill(own, -1)
    if mask is not None:
        to_centres = to_centres.masked_fill(~mask[:, None], float("inf"))
    return to_centres.argmin(dim=2)
