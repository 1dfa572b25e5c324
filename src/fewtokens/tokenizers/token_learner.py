"""TokenLearner: a few tokens, each a spatially weighted sum of all patches, with learned weights.

Ryoo et al., "TokenLearner: What Can 8 Learned Tokens Do for Images and Videos?", NeurIPS 2021, section 2.1.
There are three published forms: 1.0 (convolutions and a sigmoid), 1.1 (an MLP and a softmax over positions, in scenic
since March 2022), and the grouped convolutions that the Keras port calls 1.1.
"""

from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewtokens.errors import check, check_choice
from fewtokens.tokenizers.base import LayerContext, NumTokens, Pooler, check_no_padding
from fewtokens.tokens import Tokens

LAYER_NORM_EPS = 1e-6  # the default of Flax and Keras; torch's is 1e-5

Gelu = Literal["tanh", "none"]


class MapPooler(Pooler):
    """Base of the three forms: they compute maps (B*T, S, N) from the patches, and tokens = maps @ values."""

    def maps(self, patches: Float[Tensor, "b m c"], tokens: Tokens) -> Float[Tensor, "b s m"]:
        """Return the weight of every patch (B*T, N, C) in each new token (B*T, S, N)."""
        raise NotImplementedError

    def values(self, patches: Float[Tensor, "b m c"]) -> Float[Tensor, "b m c"]:
        """Return the values that are summed: the patches before the norm, which only the maps apply."""
        return patches

    def pool(self, tokens: Tokens) -> Tokens:
        """Return S tokens per frame. All frames share the weights."""
        check_no_padding(self, tokens)
        patches = tokens.per_frame
        maps = self.maps(patches, tokens)
        return tokens.resample_per_frame(maps @ self.values(patches), maps)


class TokenLearner(MapPooler):
    """TokenLearner 1.0: four 3x3 convolutions with GELU between them, and a sigmoid.

    LN(x) -> 3 x (conv to S channels, GELU) -> conv -> sigmoid -> weights; tokens = sum of weight * x. There are no
    biases.

    Args:
        context: The place in the encoder.
        num_tokens: Number S of tokens per frame, see `Pooler`.
        pooling: "sum" is scenic's default, with which the initial tokens are about N/2 times as large as the patches.
            "mean" is used by the Keras example.
        gelu: "tanh" (Flax), or "none" for the exact GELU (Keras 2).
    """

    def __init__(
        self,
        context: LayerContext,
        num_tokens: NumTokens = 8,
        pooling: Literal["sum", "mean"] = "sum",
        gelu: Gelu = "tanh",
    ) -> None:
        super().__init__(context, num_tokens)
        check_choice("tokenizer.build.pooling", pooling, ("sum", "mean"))
        self.pooling = pooling
        self.norm = nn.LayerNorm(context.dim, eps=LAYER_NORM_EPS)
        widths = [context.dim, *[self.num_tokens] * 4]
        convs = [nn.Conv2d(before, after, 3, padding=1, bias=False) for before, after in pairwise(widths)]
        for conv in convs:
            lecun_normal_(conv.weight)
        self.convs = nn.ModuleList(convs)
        self.act = _gelu(gelu)

    def maps(self, patches: Float[Tensor, "b m c"], tokens: Tokens) -> Float[Tensor, "b s m"]:
        """Return sigmoid maps (B*T, S, N), divided by N if pooling is "mean"."""
        height, width = tokens.require_grid("TokenLearner 1.0, a convolution over positions,")
        x = self.norm(patches).transpose(1, 2).unflatten(2, (height, width))
        for conv in self.convs[:-1]:
            x = self.act(conv(x))
        maps = self.convs[-1](x).flatten(2).sigmoid()
        return maps / maps.shape[2] if self.pooling == "mean" else maps


class TokenLearnerV11(MapPooler):
    """TokenLearner 1.1, in scenic since March 2022: an MLP on each patch, and a softmax over the positions.

    LN(x) -> Dense to `hidden` -> GELU -> dropout -> Dense to S -> dropout -> softmax over N; tokens = weights @ x.
    As in the official code, the second dropout acts on the logits: it sets some to 0, which does not remove the patch.
    It needs no grid.

    Args:
        context: The place in the encoder.
        num_tokens: Number S of tokens per frame, see `Pooler`.
        hidden: Width of the MLP (scenic: 64).
        dropout: Rate of both dropouts.
        gelu: "tanh" (Flax), or "none" for the exact GELU.
    """

    def __init__(
        self,
        context: LayerContext,
        num_tokens: NumTokens = 8,
        hidden: int = 64,
        dropout: float = 0.0,
        gelu: Gelu = "tanh",
    ) -> None:
        super().__init__(context, num_tokens)
        self.norm = nn.LayerNorm(context.dim, eps=LAYER_NORM_EPS)
        self.mlp = MaskMlp(context.dim, hidden, self.num_tokens, dropout, gelu)

    def maps(self, patches: Float[Tensor, "b m c"], tokens: Tokens) -> Float[Tensor, "b s m"]:
        """Return softmax maps over the positions (B*T, S, N)."""
        return self.mlp(self.norm(patches)).transpose(1, 2).softmax(dim=-1)


class TokenLearnerV11Grouped(MapPooler):
    """The grouped convolutions that the Keras port calls TokenLearner 1.1 (scenic's form of December 2021).

    LN(x) -> 1x1 conv in groups, C to C -> 1x1 conv to S -> softmax over N; tokens = weights @ (1x1 grouped conv of x).
    There are no biases, no activation and, in the Keras port, no dropout. It needs no grid.

    Args:
        context: The place in the encoder.
        num_tokens: Number S of tokens per frame, see `Pooler`.
        groups: Number of groups of the two grouped convolutions; must divide C.
        dropout: Dropout rate of the values (scenic's form had one on the tokens).
    """

    def __init__(self, context: LayerContext, num_tokens: NumTokens = 8, groups: int = 8, dropout: float = 0.0) -> None:
        super().__init__(context, num_tokens)
        dim = context.dim
        check(
            groups >= 1 and dim % groups == 0, "tokenizer.build.groups", f"a divisor of the model's width {dim}", groups
        )
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        # Conv1d over the flattened positions: a 1x1 convolution uses no neighbors, so it needs no grid.
        self.group = nn.Conv1d(dim, dim, 1, groups=groups, bias=False)
        self.project = nn.Conv1d(dim, self.num_tokens, 1, bias=False)
        self.value = nn.Conv1d(dim, dim, 1, groups=groups, bias=False)
        for conv in (self.group, self.project, self.value):
            lecun_normal_(conv.weight)
        self.dropout = nn.Dropout(dropout)

    def maps(self, patches: Float[Tensor, "b m c"], tokens: Tokens) -> Float[Tensor, "b s m"]:
        """Return softmax maps over the positions (B*T, S, N)."""
        return self.project(self.group(self.norm(patches).transpose(1, 2))).softmax(dim=-1)

    def values(self, patches: Float[Tensor, "b m c"]) -> Float[Tensor, "b m c"]:
        """Return a grouped projection of the patches before the norm."""
        return self.dropout(self.value(patches.transpose(1, 2)).transpose(1, 2))


class MaskMlp(nn.Module):
    """Dense, GELU, dropout, Dense, dropout: computes the logits of the maps in TokenLearner 1.1 and TokenFuser.

    It is initialized as Flax's MlpBlock: Xavier-uniform kernels, and normal biases with a standard deviation of 1e-6.

    Args:
        dim: Width C of the input.
        hidden: Width of the hidden layer.
        out: Number of outputs.
        dropout: Rate of both dropouts.
        gelu: "tanh", or "none" for the exact GELU.
    """

    def __init__(self, dim: int, hidden: int, out: int, dropout: float, gelu: Gelu) -> None:
        super().__init__()
        check(hidden >= 1, "tokenizer.build.hidden", "an int >= 1", hidden)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, out)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)
        self.act, self.dropout = _gelu(gelu), nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n s"]:
        """Map (B, N, C) to (B, N, out)."""
        return self.dropout(self.fc2(self.dropout(self.act(self.fc1(x)))))


def lecun_normal_(weight: Tensor) -> None:
    """Initialize as Flax does by default: normal, truncated at two deviations, with variance 1/fan_in afterwards."""
    fan_in = weight[0].numel()
    std = fan_in**-0.5 / 0.87962566103423978  # the standard deviation of a unit normal truncated at +-2
    torch.nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def _gelu(kind: Gelu) -> nn.GELU:
    check_choice("tokenizer.build.gelu", kind, ("tanh", "none"))
    return nn.GELU(approximate=kind)
