"""TokenFuser: pool the tokens, run a block on the few, and map the result back to all positions.

Ryoo et al., NeurIPS 2021, section 2.2, in scenic's form. The official code replaces every block from one on by
TokenLearner -> block -> TokenFuser, plus the input, so that the grid is complete after each of them.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewtokens.errors import FewtokensError, check_choice
from fewtokens.layers.block import Block
from fewtokens.tokenizers.base import LayerContext, Pooler, Tokenizer
from fewtokens.tokenizers.token_learner import LAYER_NORM_EPS, Gelu, MaskMlp
from fewtokens.tokens import Tokens

Init = Literal["gentle", "official"]


class Fuse(nn.Module):
    """The TokenFuser module: sigmoid maps of the original patches, applied to the mixed tokens.

    tokens -> LN -> dense over the token axis -> LN = V; original -> LN -> MLP to S -> sigmoid = W; out = W @ V.

    Args:
        dim: Width C.
        num_tokens: Number S of tokens per frame.
        hidden: Width of the MLP (scenic: 64).
        normalize: Whether to use the two norms before and after the mixing.
        dropout: Dropout rate in the MLP and of the output.
        gelu: "tanh" (Flax), or "none" for the exact GELU.
        init: With "official", the mixing starts at zero. With the second norm, this gives an output of zero, no
            gradient for any other parameter in the first step, and a Jacobian of about 1/sqrt(eps) = 1000 for the
            mixing. With "gentle", the mixing starts at the identity and a gain on the output at zero: the output is
            zero as well, but gradients are of ordinary size.
    """

    def __init__(
        self,
        dim: int,
        num_tokens: int,
        hidden: int = 64,
        normalize: bool = True,
        dropout: float = 0.0,
        gelu: Gelu = "tanh",
        init: Init = "gentle",
    ) -> None:
        super().__init__()
        check_choice("tokenizer.build.init", init, ("gentle", "official"))
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS) if normalize else nn.Identity()
        self.mix = nn.Linear(num_tokens, num_tokens)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS) if normalize else nn.Identity()
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = MaskMlp(dim, hidden, num_tokens, dropout, gelu)
        self.dropout = nn.Dropout(dropout)
        self.gain = nn.Parameter(torch.zeros(dim)) if init == "gentle" else None
        nn.init.zeros_(self.mix.bias)
        nn.init.eye_(self.mix.weight) if init == "gentle" else nn.init.zeros_(self.mix.weight)

    def forward(self, tokens: Float[Tensor, "b s c"], original: Float[Tensor, "b m c"]) -> Float[Tensor, "b m c"]:
        """Map tokens (B, S, C) to the positions of the original patches (B, N, C), without a residual connection."""
        values = self.norm2(self.mix(self.norm1(tokens).transpose(1, 2)).transpose(1, 2))
        out = self.mlp(self.norm(original)).sigmoid() @ values
        return self.dropout(out if self.gain is None else out * self.gain)


class TokenFuser(Tokenizer):
    """Wraps a block: pools the tokens, runs the block on the few, and maps the result back to all positions.

    x -> inner.pool -> block -> fuse with x -> + x. Class and register tokens go through the block as usual.

    Args:
        context: The place in the encoder.
        inner: Recipe of the tokenizer that pools, called as `inner(context)`; any `Pooler`.
        hidden: See `Fuse`.
        normalize: See `Fuse`.
        dropout: See `Fuse`.
        gelu: See `Fuse`.
        init: See `Fuse`.

    Raises:
        FewtokensError: The inner tokenizer does not make a fixed number of tokens.
    """

    keeps_frames = True

    def __init__(
        self,
        context: LayerContext,
        inner: Callable[[LayerContext], Tokenizer],
        hidden: int = 64,
        normalize: bool = True,
        dropout: float = 0.0,
        gelu: Gelu = "tanh",
        init: Init = "gentle",
    ) -> None:
        super().__init__(context)
        tokenizer = inner(replace(context, full_grid=True))
        if not isinstance(tokenizer, Pooler):
            raise FewtokensError(
                "TokenFuser wraps tokenizers that make a fixed number of tokens, such as token_learner or pool, got "
                f"{type(tokenizer).__name__}. Set tokenizer@tokenizer.inner=token_learner_v11."
            )
        self.inner = tokenizer
        self.fuse = Fuse(context.dim, tokenizer.num_tokens, hidden, normalize, dropout, gelu, init)

    def forward(self, tokens: Tokens, block: Block) -> Tokens:
        """Return the tokens after the block, with the same number and grid as before it."""
        few = block(self.inner.pool(tokens))
        original = tokens.per_frame
        patches = self.fuse(few.per_frame, original) + original
        x = torch.cat([few.x[:, : few.prefix], patches.reshape(tokens.patches.shape)], dim=1)
        return replace(tokens, x=x)
