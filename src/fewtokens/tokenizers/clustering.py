"""Clusters of patches and distances between patches, for the clustering methods DPC-KNN and K-medoids."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fewtokens.layers.attention import autocast_disabled
from fewtokens.tokenizers.base import valid_patches
from fewtokens.tokens import Tokens, with_prefix


@dataclass(frozen=True)
class Clusters:
    """An assignment of the patches of each sample, or of each frame, to clusters.

    Args:
        centers: Position of the patch at the center of each cluster (B, K).
        slot: Index of the cluster of each patch (B, N).
        mask: False where an entry of `centers` is padding (B, K); None if none is.
    """

    centers: Int[Tensor, "b k"]
    slot: Int[Tensor, "b m"]
    mask: Bool[Tensor, "b k"] | None

    def weights(self, tokens: Tokens) -> Float[Tensor, "b k m"]:
        """Return the weight of every patch in every cluster (B, K, N).

        It is the patch's size in the patch's own cluster, and 0 in the others and for padding.
        """
        own = self.slot[:, None] == torch.arange(self.centers.shape[1], device=self.slot.device)[:, None]
        size = tokens.sizes if tokens.mask is None else tokens.sizes * tokens.mask
        return own * size[:, tokens.prefix :].reshape(self.slot.shape)[:, None]

    def describe(self, few: Tokens, tokens: Tokens, sizes: Float[Tensor, "b k"] | None) -> Tokens:
        """Return `few` with the frames of `tokens`, and with the padding and the sizes of the clusters.

        Args:
            few: One patch token per cluster.
            tokens: The tokens that were clustered.
            sizes: Size of each cluster (B, K), or None.
        """
        batch, prefix = tokens.x.shape[0], tokens.prefix
        mask = None if self.mask is None else with_prefix(self.mask.reshape(batch, -1), prefix)
        # An entry that is padding has size 0.
        size = None if sizes is None else with_prefix(sizes.clamp_min(1).reshape(batch, -1), prefix)
        return replace(few, frames=tokens.frames, size=size, mask=mask)


def valid_per_frame(tokens: Tokens) -> Bool[Tensor, "bt m"] | None:
    """Return False where a patch token is padding, in the layout of `per_frame` (B*T, N/T); None without padding."""
    valid = valid_patches(tokens)
    return None if valid is None else valid.reshape(tokens.x.shape[0] * tokens.frames, -1)


def squared_distances(x: Float[Tensor, "b m c"]) -> Float[Tensor, "b m m"]:
    """Return the squared distances between all patches of a sample (B, N, N), at least in float32.

    They are never negative, and 0 between equal patches.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    with autocast_disabled(x.device):
        products = x @ x.transpose(1, 2)
    # The diagonal, not x * x, which is rounded differently, so that equal patches would have a distance.
    norms = products.diagonal(dim1=1, dim2=2)
    return (norms[:, :, None] + norms[:, None] - 2 * products).clamp_min(0)


def nearest_center(
    distances: Float[Tensor, "b m m"], centers: Int[Tensor, "b k"], mask: Bool[Tensor, "b k"] | None
) -> Int[Tensor, "b m"]:
    """Return the index into `centers` of each patch's nearest center (B, N).

    Of equally near centers it is the first. A patch that is a center belongs to itself.

    Args:
        distances: Distances between all patches (B, N, N).
        centers: Positions of the centers (B, K).
        mask: False where an entry of `centers` is padding (B, K), or None.
    """
    to_centers = distances.gather(2, centers[:, None].expand(-1, distances.shape[1], -1))
    is_center = centers[:, None] == torch.arange(distances.shape[1], device=centers.device)[:, None]
    to_centers = to_centers.masked_fill(is_center, -1)
    if mask is not None:
        to_centers = to_centers.masked_fill(~mask[:, None], float("inf"))
    return to_centers.argmin(dim=2)
