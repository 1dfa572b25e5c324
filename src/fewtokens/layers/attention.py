"""Self-attention that can say, afterwards, what it looked at."""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.layers.attention import Attention as TimmAttention
from torch import Tensor


@dataclass(frozen=True)
class Evidence:
    """What one attention layer saw, from which tokenizers choose. The N x N matrix is never built.

    Args:
        query: (B, heads, Q, D), where Q = N unless only some tokens ask.
        key: (B, heads, N, D).
        value: (B, heads, N, D).
        bias: Additive attention term (B, 1, 1, N), or None.
        scale: What the products of query and key are multiplied by.
    """

    query: Float[Tensor, "b h q d"]
    key: Float[Tensor, "b h n d"]
    value: Float[Tensor, "b h n d"]
    bias: Float[Tensor, "b 1 1 n"] | None
    scale: float

    def rows(self, n: int) -> Float[Tensor, "b h rows n"]:
        """The first n rows of the attention matrix (B, heads, n, N), in float32; a class token's row costs N*C."""
        device = self.query.device.type  # "meta" knows no autocast
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            logits = (self.query[:, :, :n].float() * self.scale) @ self.key.float().transpose(-2, -1)
        if self.bias is not None:
            logits = logits + self.bias.float()
        return logits.softmax(dim=-1)

    def only(self, rows: Int[Tensor, "b k"]) -> "Evidence":
        """The same keys and values for the queries at `rows` (B, K) alone."""
        index = rows[:, None, :, None].expand(-1, self.query.shape[1], -1, self.query.shape[3])
        return replace(self, query=self.query.gather(2, index))


class Attention(TimmAttention):
    """timm's attention, with its parameters and names, in two steps: `observe`, then `mix`."""

    def observe(self, x: Float[Tensor, "b n c"], bias: Float[Tensor, "b 1 1 n"] | None) -> Evidence:
        """Queries, keys and values of x (B, N, C)."""
        qkv = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        return Evidence(self.q_norm(query), self.k_norm(key), value, bias, self.scale)

    def mix(self, evidence: Evidence, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """The values, mixed by attention and projected (B, N, C); x is `observe`'s, at the queries' rows."""
        mixed = self._attend(evidence)
        mixed = self.norm(mixed.transpose(1, 2).reshape(x.shape[0], -1, self.attn_dim))
        if self.gate is not None:
            mixed = mixed * torch.sigmoid(self.gate(x))
        return self.proj_drop(self.proj(mixed))

    def _attend(self, evidence: Evidence) -> Float[Tensor, "b h q d"]:
        dropout = self.attn_drop.p if self.training else 0.0
        query, key, value = evidence.query, evidence.key, evidence.value
        bias = None if evidence.bias is None else evidence.bias.to(query.dtype)
        if dropout and query.device.type == "cpu":
            # The CPU has no fused kernel with dropout, and torch's fallback goes through float32 copies.
            logits = (query * self.scale) @ key.transpose(-2, -1)
            weights = (logits if bias is None else logits + bias).softmax(dim=-1)
            return F.dropout(weights, dropout) @ value
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
