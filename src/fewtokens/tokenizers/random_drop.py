"""Random drop: the floor under every method that chooses.

PatchDropout (Liu et al., WACV 2023, arXiv 2208.07220) drops so at the input and in training; here it may stand before
any block, and drops in evaluation too, as the methods do that it is compared with.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fewtokens.layers.block import Block
from fewtokens.tokenizers.base import LayerContext, Selector
from fewtokens.tokens import Tokens

WORD, GOLDEN = 2**32, 0x9E3779B9  # far apart for neighbouring seeds


class RandomDrop(Selector):
    """Before a block, every image keeps a share of its patches, drawn for itself without replacement.

    Args:
        context: Where it stands.
        keep_rate: Share of the patches that stay, rounded up.
        seed: Of the draw in evaluation, which depends on nothing but the seed, the block and the place in the batch:
            evaluating twice gives the same. In training, torch's own generator draws.
    """

    def __init__(self, context: LayerContext, keep_rate: float = 0.7, seed: int = 0) -> None:
        super().__init__(context, keep_rate)
        self.seed = seed

    def forward(self, tokens: Tokens, block: Block) -> Tokens:
        """Drop, then the block."""
        seed = None if self.training else self.seed + self.context.block
        return block(self.keep_highest(tokens, draw(tokens.patches, seed)))


def draw(patches: Float[Tensor, "b m c"], seed: int | None) -> Float[Tensor, "b m"]:
    """A random number for every patch (B, N), uniform in [0, 1).

    Without a seed torch's generator of the device draws. With one they are a function of seed, image and patch (the
    finalizer of MurmurHash3): the same on every device, and, unlike a generator, nothing that a compiled or exported
    graph could not hold.
    """
    if seed is None:
        return torch.rand(patches.shape[:2], device=patches.device)
    x = torch.arange(patches.shape[0] * patches.shape[1], device=patches.device) + seed * GOLDEN % WORD
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * factor % WORD
    return ((x ^ (x >> 16)).to(torch.float64) / WORD).float().reshape(patches.shape[:2])
