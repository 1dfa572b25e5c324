"""Random weights whose class token attends to few patches, as trained weights do, and to fewer in every block.

The time that an adaptive tokenizer takes depends on how many patches the attention is spread over. Random weights
spread it evenly, so that no patch is dropped. If no trained weights are available, sharpened ones can be timed instead.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from fewtokens.analysis.evaluation import evaluating
from fewtokens.analysis.flops import mean_tokens
from fewtokens.backbones.vit import ViT
from fewtokens.errors import FewtokensError
from fewtokens.layers.block import Block
from fewtokens.tokenizers.ats import ATS
from fewtokens.tokens import Tokens

STEPS = 24  # of the bisection between the factors 1 and 2^16


@torch.no_grad()
def sharpen(model: ViT, images: Float[Tensor, "b c *t h w"], profile: Sequence[float]) -> list[float]:
    """Scale the queries of the last blocks until ATS keeps the given number of tokens after each of them.

    Args:
        model: Its parameters are changed. It must have a class token.
        images: (B, channels, H, W), on which tokens are counted.
        profile: Tokens after each of the last blocks, averaged over the images, class token included, decreasing.

    Returns:
        The number of tokens after each of these blocks that was reached.

    Raises:
        FewtokensError: The profile does not decrease or is longer than the number of blocks, or the model has no class
            token.
    """
    tokens = model.embed(images)
    layers = list(zip(model.encoder.tokenizers, model.encoder.blocks, strict=True))
    counts = [float(tokens.x.shape[1]), *profile, 1.0]
    if len(profile) > len(layers) or any(after > before for before, after in pairwise(counts)):
        raise FewtokensError(
            f"`sharpen` must be at most {len(layers)} numbers that decrease from {tokens.x.shape[1]} to 1, the tokens "
            f"after each of the last blocks, got {list(profile)}."
        )
    first = len(layers) - len(profile)
    reached = []
    with evaluating(model):
        for _, block in layers[:first]:
            tokens = block(tokens)
        for (tokenizer, block), target in zip(layers[first:], profile, strict=True):
            tokens = _sharpen_block(ATS(tokenizer.context), block, tokens, target)
            reached.append(mean_tokens(tokens))
    return reached


def _sharpen_block(ats: ATS, block: Block, tokens: Tokens, target: float) -> Tokens:
    queries = [part[: part.shape[0] // 3] for part in block.attn.qkv.parameters()]  # queries come first in qkv
    before = [part.clone() for part in queries]

    def scaled(power: float) -> Tokens:
        for part, old in zip(queries, before, strict=True):
            part.copy_(old * 2**power)
        return ats(tokens, block)

    low, high = 0.0, 16.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_tokens(scaled(middle)) > target else (low, middle)
    return scaled(high)
