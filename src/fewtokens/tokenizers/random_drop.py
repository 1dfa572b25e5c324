"""Random token dropping, the baseline for all selection methods.

PatchDropout (Liu et al., WACV 2023, arXiv 2208.07220) drops random patches at the input, in training only. Here they
are dropped before any block, and in evaluation as well, as by the methods that are compared with it.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fewtokens.layers.block import Block
from fewtokens.tokenizers.base import KeepRate, LayerContext, Selector
from fewtokens.tokens import Tokens

WORD = 2**32
GOLDEN = 0x9E3779B9  # 2^32 divided by the golden ratio: multiples of it are far apart for consecutive seeds.


class RandomDrop(Selector):
    """Keeps a random share of the patches of each image, sampled without replacement before the block.

    Args:
        context: The place in the encoder.
        keep_rate: Share of the patches that stay, see `Selector`.
        seed: Seed of the sampling in evaluation, which depends only on the seed, the block and the position in the
            batch, so that evaluation can be repeated. Training uses torch's own generator.
    """

    def __init__(self, context: LayerContext, keep_rate: KeepRate = 0.7, seed: int = 0) -> None:
        super().__init__(context, keep_rate)
        self.seed = seed

    def forward(self, tokens: Tokens, block: Block) -> Tokens:
        """Drop patches and run the block."""
        seed = None if self.training else self.seed + self.context.block
        return block(self.keep_highest(tokens, random_scores(tokens.patches, seed)))


def random_scores(patches: Float[Tensor, "b m c"], seed: int | None) -> Float[Tensor, "b m"]:
    """Return a random number for every patch (B, N), uniform in [0, 1).

    Without a seed they come from torch's generator of the device. With a seed they are a function of seed, image and
    patch: the finalizer of MurmurHash3. That gives the same numbers on every device and, unlike a generator, can be
    compiled and exported.
    """
    if seed is None:
        return torch.rand(patches.shape[:2], device=patches.device)
    x = torch.arange(patches.shape[0] * patches.shape[1], device=patches.device) + seed * GOLDEN % WORD
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * factor % WORD
    return ((x ^ (x >> 16)).float() / WORD).reshape(patches.shape[:2])
