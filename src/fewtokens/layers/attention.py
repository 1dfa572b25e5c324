"""Self-attention that can say, afterwards, what it looked at."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers.attention import Attention as TimmAttention
from torch import Tensor

EPS = 1e-6


@dataclass(frozen=True)
class Evidence:
    """What one attention layer saw, from which tokenizers choose. The N x N matrix is never built.

    Args:
        query: (B, heads, Q, D), where Q = N unless only the first tokens, or chosen ones, ask.
        key: (B, heads, N, D).
        value: (B, heads, N, D).
        bias: Additive attention term (B, 1, 1, N), or None.
        scale: What the products of query and key are multiplied by.
        keep: Decisions of a method that learns them (B, N), see `Tokens.keep`, or None.
    """

    query: Float[Tensor, "b h q d"]
    key: Float[Tensor, "b h n d"]
    value: Float[Tensor, "b h n d"]
    bias: Float[Tensor, "b 1 1 n"] | None
    scale: float
    keep: Float[Tensor, "b n"] | None = None

    def rows(self, n: int) -> Float[Tensor, "b h rows n"]:
        """The first n rows of the attention matrix (B, heads, n, N), in float32.

        They cost n * N * C multiply-adds, and a single one, a class token's, heads * N * C, which is faster.
        """
        device = self.query.device.type  # "meta" knows no autocast
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            query, key = self.query[:, :, :n].float() * self.scale, self.key.float()
            logits = _single_row(query, key) if n == 1 else query @ key.transpose(-2, -1)
        if self.bias is not None:
            logits = logits + self.bias.float()
        return logits.softmax(dim=-1) if self.keep is None else softmax_over(logits, self.keep)


class Attention(TimmAttention):
    """timm's attention, with its parameters and names, in two steps: `observe`, then `mix`."""

    def observe(
        self,
        x: Float[Tensor, "b n c"],
        bias: Float[Tensor, "b 1 1 n"] | None,
        first: int | None = None,
        keep: Float[Tensor, "b n"] | None = None,
    ) -> Evidence:
        """Queries, keys and values of x (B, N, C).

        Args:
            x: Normalised tokens.
            bias: Additive attention term.
            first: Queries of so many tokens only; None for all.
            keep: Decisions of a method that learns them, see `Tokens.keep`.
        """
        if first is None:
            query, key, value = self._split(self.qkv(x), 3)
            return Evidence(self.q_norm(query), self.k_norm(key), value, bias, self.scale, keep)
        weight, shift = self.qkv.weight[self.attn_dim :], self._shift(slice(self.attn_dim, None))
        key, value = self._split(F.linear(x, weight, shift), 2)
        return Evidence(self.queries(x[:, :first]), self.k_norm(key), value, bias, self.scale, keep)

    def queries(self, x: Float[Tensor, "b q c"]) -> Float[Tensor, "b h q d"]:
        """The queries (B, heads, Q, D) of some tokens (B, Q, C), and nothing else of them."""
        weight, shift = self.qkv.weight[: self.attn_dim], self._shift(slice(self.attn_dim))
        return self.q_norm(self._split(F.linear(x, weight, shift), 1)[0])

    def mix(self, evidence: Evidence, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """The values, mixed by attention and projected (B, N, C); x is `observe`'s, at the queries' rows."""
        mixed = self._attend(evidence)
        mixed = self.norm(mixed.transpose(1, 2).reshape(x.shape[0], -1, self.attn_dim))
        if self.gate is not None:
            mixed = mixed * torch.sigmoid(self.gate(x))
        return self.proj_drop(self.proj(mixed))

    def _split(self, projected: Float[Tensor, "b n width"], parts: int) -> tuple[Tensor, ...]:
        """Each part as (B, heads, N, D)."""
        batch, count, _ = projected.shape
        return projected.reshape(batch, count, parts, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)

    def _shift(self, part: slice) -> Tensor | None:
        return None if self.qkv.bias is None else self.qkv.bias[part]

    def _slow_backward(self, key: Float[Tensor, "b h n d"]) -> bool:
        # In half precision the backward of the CPU's fused kernel took 5 times as long as the explicit one at 65
        # tokens, twice at 197, and as long beyond 785.
        return self.training and torch.is_grad_enabled() and key.dtype != torch.float32 and key.shape[2] <= 512

    def _attend(self, evidence: Evidence) -> Float[Tensor, "b h q d"]:
        dropout = self.attn_drop.p if self.training else 0.0
        query, key, value = evidence.query, evidence.key, evidence.value
        if evidence.keep is not None:
            weights = evidence.rows(query.shape[2]).to(value.dtype)
            return F.dropout(weights, dropout) @ value
        bias = None if evidence.bias is None else evidence.bias.to(query.dtype)
        if query.device.type == "cpu" and (dropout or self._slow_backward(key)):
            # The CPU has no fused kernel with dropout, and torch's fallback goes through float32 copies.
            logits = (query * self.scale) @ key.transpose(-2, -1)
            weights = (logits if bias is None else logits + bias).softmax(dim=-1)
            return F.dropout(weights, dropout) @ value
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)


def softmax_over(logits: Float[Tensor, "b h q n"], keep: Float[Tensor, "b n"]) -> Float[Tensor, "b h q n"]:
    """Softmax over the tokens that stay, whose decisions get a gradient, also where they are 0.

    A token always sees itself. DynamicViT's masked softmax (Rao et al. 2021, equation 11), with the small constant of
    the official code, so that a row is never 0 / 0.

    Args:
        logits: Of the first Q of N tokens.
        keep: 1 or 0 for each.
    """
    rows, count = logits.shape[2], logits.shape[3]
    itself = torch.eye(rows, count, dtype=keep.dtype, device=keep.device)
    weights = (logits - logits.amax(dim=-1, keepdim=True)).exp()
    weights = weights * (keep[:, None, None] + (1 - keep[:, None, None]) * itself)
    return (weights + EPS / count) / (weights.sum(dim=-1, keepdim=True) + EPS)


def _single_row(query: Float[Tensor, "b h 1 d"], key: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h 1 n"]:
    """Products of one query per head with all keys, as one product of matrices over the heads side by side.

    Keys lie so in memory, where a product head by head would first copy them: measured 3 times faster on a CPU.
    """
    heads = query.shape[1]
    apart = torch.eye(heads, dtype=query.dtype, device=query.device)
    blocks = (query[:, :, 0, :, None] * apart[:, None]).flatten(1, 2)  # zero where a query meets another head's keys
    return (key.transpose(1, 2).flatten(2) @ blocks).transpose(1, 2)[:, :, None]
