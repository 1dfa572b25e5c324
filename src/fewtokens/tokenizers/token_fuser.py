"""TokenFuser: spread a few processed tokens back over all positions.

Ryoo et al., NeurIPS 2021, section 2.2, in scenic's form. The official code replaces a block by
TokenLearner -> block -> TokenFuser, plus the input, for every block from one on: the lattice is whole after each.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewtokens.errors import FewtokensError
from fewtokens.layers.block import Block
from fewtokens.tokenizers.base import LayerContext, Pooler, Tokenizer
from fewtokens.tokenizers.token_learner import LAYER_NORM_EPS, MaskMlp
from fewtokens.tokens import Tokens


class Fuse(nn.Module):
    """The TokenFuser module: sigmoid maps of the original patches, times the mixed tokens.

    tokens -> LN -> dense over the token axis -> LN = V; original -> LN -> MLP to S -> sigmoid = W; out = W @ V.

    Args:
        dim: Width C.
        num_tokens: Tokens per frame, S.
        hidden: Width of the MLP (scenic: 64).
        normalize: The two norms around the mixing.
        dropout: Rate in the MLP and on the output.
        gelu: "tanh" (Flax) or "none" for the exact one.
        init: "official" starts the mixing at zero. Under the second norm that gives an output of zero, no gradient to
            any other parameter in the first step, and a Jacobian of about 1/sqrt(eps) = 1000 for the mixing. "gentle",
            the better one, starts the mixing at the identity and the gain of the output at zero: the same identity
            at the start, with ordinary gradients.
    """

    def __init__(
        self,
        dim: int,
        num_tokens: int,
        hidden: int = 64,
        normalize: bool = True,
        dropout: float = 0.0,
        gelu: Literal["tanh", "none"] = "tanh",
        init: Literal["gentle", "official"] = "gentle",
    ) -> None:
        super().__init__()
        if init not in ("gentle", "official"):
            raise FewtokensError(
                "TokenFuser has two initialisations",
                expected="'gentle' or 'official'",
                got=repr(init),
                fix="set tokenizer.build.init=gentle",
            )
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
        """Tokens (B, S, C) spread over the positions of the original (B, N, C); no residual inside."""
        values = self.norm2(self.mix(self.norm1(tokens).transpose(1, 2)).transpose(1, 2))
        out = self.mlp(self.norm(original)).sigmoid() @ values
        return self.dropout(out if self.gain is None else out * self.gain)


class TokenFuser(Tokenizer):
    """Around a block: fewer tokens in, the block, all positions out.

    x -> inner.pool -> block -> fuse with x -> + x. Class and register tokens take part in the block and leave it as
    the block made them. Any tokenizer with a fixed number of tokens can be inside.

    Args:
        context: Where it stands.
        inner: Recipe of the tokenizer inside, `inner(context)`.
        hidden: See `Fuse`.
        normalize: See `Fuse`.
        dropout: See `Fuse`.
        gelu: See `Fuse`.
        init: See `Fuse`.
    """

    keeps_frames = True

    def __init__(
        self,
        context: LayerContext,
        inner: Callable[[LayerContext], Tokenizer],
        hidden: int = 64,
        normalize: bool = True,
        dropout: float = 0.0,
        gelu: Literal["tanh", "none"] = "tanh",
        init: Literal["gentle", "official"] = "gentle",
    ) -> None:
        super().__init__(context)
        tokenizer = inner(replace(context, stage=0))  # no place before it left it fewer
        if not isinstance(tokenizer, Pooler):
            raise FewtokensError(
                "TokenFuser wraps a tokenizer that makes a fixed number of tokens",
                expected="token_learner, token_learner_v11 or another Pooler",
                got=type(tokenizer).__name__,
                fix="choose it with tokenizer@tokenizer.inner=token_learner_v11",
            )
        self.inner = tokenizer
        self.fuse = Fuse(context.dim, tokenizer.num_tokens, hidden, normalize, dropout, gelu, init)

    def forward(self, tokens: Tokens, block: Block) -> Tokens:
        """The tokens after the block, as many as before it, on the same lattice."""
        few = block(self.inner.pool(tokens))
        original = tokens.per_frame
        patches = self.fuse(few.per_frame, original) + original
        x = torch.cat([few.x[:, : few.prefix], patches.reshape(tokens.patches.shape)], dim=1)
        return replace(tokens, x=x)
