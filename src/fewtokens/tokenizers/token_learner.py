"""TokenLearner: a few tokens, each a spatially weighted sum of all patches, with learned weights.

Ryoo et al., "TokenLearner: What Can 8 Learned Tokens Do for Images and Videos?", NeurIPS 2021, section 2.1.
Three published forms: 1.0 (convolutions and a sigmoid), 1.1 (an MLP and a softmax over positions, as scenic has it
since March 2022) and the grouped convolutions that the Keras port calls 1.1.
"""

from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewtokens.errors import FewtokensError
from fewtokens.tokenizers.base import LayerContext, Pooler
from fewtokens.tokens import Tokens

LAYER_NORM_EPS = 1e-6  # Flax's and Keras's, not torch's


class MapPooler(Pooler):
    """What the three forms share: maps (B*T, S, N) from the patches, tokens = maps @ values."""

    def maps(self, patches: Float[Tensor, "b m c"], tokens: Tokens) -> Float[Tensor, "b s m"]:
        """How much of every patch (B*T, N, C) goes into each new token (B*T, S, N)."""
        raise NotImplementedError

    def values(self, patches: Float[Tensor, "b m c"]) -> Float[Tensor, "b m c"]:
        """What is summed: the raw patches, not the normalised ones that the maps are made of."""
        return patches

    def pool(self, tokens: Tokens) -> Tokens:
        """S tokens per frame, with weights shared between frames."""
        patches = tokens.per_frame
        maps = self.maps(patches, _without_padding(tokens, type(self).__name__))
        return tokens.resample_per_frame(maps @ self.values(patches), maps)


class TokenLearner(MapPooler):
    """TokenLearner 1.0: four 3x3 convolutions, GELU between them, a sigmoid at the end.

    LN(x) -> 3 x (conv to S channels, GELU) -> conv -> sigmoid -> weights; tokens = sum of weight * x. No biases.

    Args:
        context: Where it stands.
        num_tokens: Tokens per frame, S.
        pooling: "sum" (scenic's default; the tokens start out about N/2 times as large as the patches) or "mean"
            (the Keras example's).
        gelu: "tanh" (Flax) or "none" for the exact one (Keras 2).
    """

    def __init__(
        self,
        context: LayerContext,
        num_tokens: int = 8,
        pooling: Literal["sum", "mean"] = "sum",
        gelu: Literal["tanh", "none"] = "tanh",
    ) -> None:
        super().__init__(context, num_tokens)
        if pooling not in ("sum", "mean"):
            raise FewtokensError(
                "TokenLearner pools by sum or by mean",
                expected="'sum' or 'mean'",
                got=repr(pooling),
                fix="set tokenizer.build.pooling=mean",
            )
        self.pooling = pooling
        self.norm = nn.LayerNorm(context.dim, eps=LAYER_NORM_EPS)
        widths = [context.dim, num_tokens, num_tokens, num_tokens, num_tokens]
        convs = [nn.Conv2d(before, after, 3, padding=1, bias=False) for before, after in pairwise(widths)]
        for conv in convs:
            lecun_normal_(conv.weight)
        self.convs = nn.ModuleList(convs)
        self.act = _gelu(gelu)

    def maps(self, patches: Float[Tensor, "b m c"], tokens: Tokens) -> Float[Tensor, "b s m"]:
        """Sigmoid maps, divided by N when pooling is "mean"."""
        height, width = tokens.require_grid("TokenLearner 1.0, a convolution over positions,")
        x = self.norm(patches).transpose(1, 2).unflatten(2, (height, width))
        for conv in self.convs[:-1]:
            x = self.act(conv(x))
        maps = self.convs[-1](x).flatten(2).sigmoid()
        return maps / maps.shape[2] if self.pooling == "mean" else maps


class TokenLearnerV11(MapPooler):
    """TokenLearner 1.1, scenic's form since March 2022: an MLP per patch, a softmax over positions.

    LN(x) -> Dense to `hidden` -> GELU -> dropout -> Dense to S -> dropout -> softmax over N; tokens = weights @ x.
    The second dropout acts on the logits, as in the official code: a dropped logit is a neutral one.
    It needs no lattice.

    Args:
        context: Where it stands.
        num_tokens: Tokens per frame, S.
        hidden: Width of the MLP (scenic: 64).
        dropout: Rate of both dropouts.
        gelu: "tanh" (Flax) or "none" for the exact one.
    """

    def __init__(
        self,
        context: LayerContext,
        num_tokens: int = 8,
        hidden: int = 64,
        dropout: float = 0.0,
        gelu: Literal["tanh", "none"] = "tanh",
    ) -> None:
        super().__init__(context, num_tokens)
        self.norm = nn.LayerNorm(context.dim, eps=LAYER_NORM_EPS)
        self.mlp = MaskMlp(context.dim, hidden, num_tokens, dropout, gelu)

    def maps(self, patches: Float[Tensor, "b m c"], tokens: Tokens) -> Float[Tensor, "b s m"]:
        """Softmax over the positions, one map per token."""
        return self.mlp(self.norm(patches)).transpose(1, 2).softmax(dim=-1)


class TokenLearnerV11Grouped(MapPooler):
    """The grouped-convolution form that the Keras port calls TokenLearner 1.1 (scenic's of December 2021).

    LN(x) -> 1x1 conv in groups, C to C -> 1x1 conv to S -> softmax over N; tokens = weights @ (1x1 grouped conv of the
    raw x). No biases, no activation, no dropout in the Keras port.

    Args:
        context: Where it stands.
        num_tokens: Tokens per frame, S.
        groups: Groups of the two grouped convolutions; must divide C.
        dropout: Rate on the tokens (scenic's form had one).
    """

    def __init__(self, context: LayerContext, num_tokens: int = 8, groups: int = 8, dropout: float = 0.0) -> None:
        super().__init__(context, num_tokens)
        if groups < 1 or context.dim % groups:
            raise FewtokensError(
                "The groups of a grouped convolution divide the width",
                expected=f"a divisor of {context.dim}",
                got=groups,
                fix="set tokenizer.build.groups to 4 or 8, or change backbone.dim",
            )
        self.norm = nn.LayerNorm(context.dim, eps=LAYER_NORM_EPS)
        # Conv1d over the flattened positions: a 1x1 convolution knows no neighbours, so it needs no lattice.
        self.group = nn.Conv1d(context.dim, context.dim, 1, groups=groups, bias=False)
        self.project = nn.Conv1d(context.dim, num_tokens, 1, bias=False)
        self.value = nn.Conv1d(context.dim, context.dim, 1, groups=groups, bias=False)
        for conv in (self.group, self.project, self.value):
            lecun_normal_(conv.weight)
        self.dropout = nn.Dropout(dropout)

    def maps(self, patches: Float[Tensor, "b m c"], tokens: Tokens) -> Float[Tensor, "b s m"]:
        """Softmax over the positions, one map per token."""
        return self.project(self.group(self.norm(patches).transpose(1, 2))).softmax(dim=-1)

    def values(self, patches: Float[Tensor, "b m c"]) -> Float[Tensor, "b m c"]:
        """A grouped projection of the raw patches."""
        return self.dropout(self.value(patches.transpose(1, 2)).transpose(1, 2))


class MaskMlp(nn.Module):
    """Dense, GELU, dropout, Dense, dropout: what TokenLearner 1.1 and TokenFuser make their maps with.

    Initialised as Flax's MlpBlock: Xavier-uniform kernels, biases normal with standard deviation 1e-6.
    """

    def __init__(self, dim: int, hidden: int, out: int, dropout: float, gelu: Literal["tanh", "none"]) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, out)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)
        self.act, self.dropout = _gelu(gelu), nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n s"]:
        """(B, N, C) to (B, N, out)."""
        return self.dropout(self.fc2(self.dropout(self.act(self.fc1(x)))))


def lecun_normal_(weight: Tensor) -> None:
    """Flax's default: truncated normal at two deviations, variance 1/fan_in after truncation."""
    fan_in = weight[0].numel()
    std = fan_in**-0.5 / 0.87962566103423978  # deviation of a unit normal cut at +-2
    torch.nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def _gelu(kind: str) -> nn.GELU:
    if kind not in ("tanh", "none"):
        raise FewtokensError(
            "GELU has two forms here",
            expected="'tanh' (Flax, Keras 3) or 'none' (exact: timm, Keras 2)",
            got=repr(kind),
            fix="set gelu=tanh or gelu=none",
        )
    return nn.GELU(approximate=kind)


def _without_padding(tokens: Tokens, name: str) -> Tokens:
    if tokens.mask is not None:
        raise FewtokensError(
            f"{name} mixes all patches, so none may be padding",
            expected="tokens without padding",
            got="padded tokens, from an adaptive tokenizer before it",
            fix="place it first, or leave the adaptive tokenizer out",
        )
    return tokens
