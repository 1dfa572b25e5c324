"""Random weights whose class token looks where a trained one's would: at few patches, fewer with every block.

The time that an adaptive tokenizer takes depends on what the attention is spread over. Random weights spread it evenly,
so that nothing is dropped; where no trained ones are at hand, sharpened ones stand in for them in timing.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from fewtokens.analysis.cost import alive, evaluating
from fewtokens.backbones.vit import ViT
from fewtokens.errors import FewtokensError
from fewtokens.layers.block import Block
from fewtokens.tokenizers.ats import ATS
from fewtokens.tokenizers.base import Tokenizer
from fewtokens.tokens import Tokens

STEPS = 24  # of a bisection between factors 1 and 2^16


@torch.no_grad()
def sharpen(model: ViT, images: Float[Tensor, "b c *t h w"], profile: Sequence[float]) -> list[float]:
    """Scale the queries of the last blocks until ATS keeps so many tokens after each of them.

    Args:
        model: Its parameters are changed; it must have a class token.
        images: (B, channels, H, W) on which tokens are counted.
        profile: Tokens after each of the last blocks, class token included and falling, the mean over the images.

    Returns:
        Tokens after each of these blocks, as they came out.

    Raises:
        FewtokensError: The profile does not fall, or has more numbers than there are blocks, or no class token.
    """
    blocks, tokens = list(model.encoder.blocks), model.embed(images)
    counts = [float(tokens.x.shape[1]), *profile, 1.0]
    if len(profile) > len(blocks) or any(after > before for before, after in pairwise(counts)):
        raise FewtokensError(
            "A profile says how many tokens are left after each of the last blocks",
            expected=f"at most {len(blocks)} numbers that fall from {tokens.x.shape[1]} to 1",
            got=list(profile),
            fix="set sharpen=[165,150,140,120,110,100,90,78,65]",
        )
    found = []
    with evaluating(model):
        for index, (tokenizer, block) in enumerate(zip(model.encoder.tokenizers, blocks, strict=True)):
            assert isinstance(block, Block)
            assert isinstance(tokenizer, Tokenizer)
            wanted = index - (len(blocks) - len(profile))
            if wanted >= 0:
                tokens = _sharpen_block(ATS(tokenizer.context), block, tokens, profile[wanted])
                found.append(alive(tokens))
            else:
                tokens = block(tokens)
    return found


def _sharpen_block(ats: ATS, block: Block, tokens: Tokens, wanted: float) -> Tokens:
    queries = [part[: part.shape[0] // 3] for part in block.attn.qkv.parameters()]  # queries come first in qkv
    before = [part.clone() for part in queries]

    def scaled(power: float) -> Tokens:
        for part, old in zip(queries, before, strict=True):
            part.copy_(old * 2**power)
        return ats(tokens, block)

    low, high = 0.0, 16.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if alive(scaled(middle)) > wanted else (low, middle)
    return scaled(high)
