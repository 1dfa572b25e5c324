"""Self-attention in two steps, so that tokenizers can read attention weights between them."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers.attention import Attention as TimmAttention
from torch import Tensor, nn

EPS = 1e-6


@dataclass(frozen=True)
class AttentionState:
    """Queries, keys and values of one attention layer, from which tokenizers compute attention weights on demand.

    Args:
        query: (B, heads, Q, D). Q = N, unless only the queries of the first or of selected tokens were computed.
        key: (B, heads, N, D).
        value: (B, heads, N, D).
        bias: Additive attention bias (B, 1, 1, N), or None.
        scale: Factor on the product of query and key.
        keep_mask: See `Tokens.keep_mask` (B, N), or None.
    """

    query: Float[Tensor, "b h q d"]
    key: Float[Tensor, "b h n d"]
    value: Float[Tensor, "b h n d"]
    bias: Float[Tensor, "b 1 1 n"] | None
    scale: float
    keep_mask: Float[Tensor, "b n"] | None = None

    def attention_rows(self, n: int) -> Float[Tensor, "b h rows n"]:
        """Return the first n rows of the attention matrix (B, heads, n, N), in float32.

        This costs n * N * C multiply-adds; for n = 1 it takes heads * N * C, which is faster (see `_single_row`).
        """
        with autocast_disabled(self.query.device):
            query, key = self.query[:, :, :n].float() * self.scale, self.key.float()
            logits = _single_row(query, key) if n == 1 else query @ key.transpose(-2, -1)
        if self.bias is not None:
            logits = logits + self.bias.float()
        return logits.softmax(dim=-1) if self.keep_mask is None else masked_softmax(logits, self.keep_mask)

    def class_attention(self) -> Float[Tensor, "b h n"]:
        """Return the attention weights of the first token, which is the class token (B, heads, N), in float32."""
        return self.attention_rows(1)[:, :, 0]

    def value_norms(self) -> Float[Tensor, "b n"]:
        """Return the norm of the values, concatenated over heads (B, N), in float32."""
        return torch.linalg.vector_norm(self.value.float(), dim=(1, 3))


class Attention(TimmAttention):
    """timm's attention with its parameters and their names, split into `project_qkv` and `attend`."""

    def project_qkv(
        self,
        x: Float[Tensor, "b n c"],
        bias: Float[Tensor, "b 1 1 n"] | None,
        asking: Float[Tensor, "b q c"] | None = None,
        keep_mask: Float[Tensor, "b n"] | None = None,
    ) -> AttentionState:
        """Compute queries, keys and values of x (B, N, C).

        Args:
            x: Normalized tokens.
            bias: Additive attention bias (B, 1, 1, N), or None.
            asking: Normalized tokens (B, Q, C), of which the queries are computed; None for x itself.
            keep_mask: See `Tokens.keep_mask`.
        """
        if asking is None:
            query, key, value = self._split(self.qkv(x), 3)
            return AttentionState(self.q_norm(query), self.k_norm(key), value, bias, self.scale, keep_mask)
        key, value = self._split(self._project(x, slice(self.attn_dim, None)), 2)
        return AttentionState(self.project_queries(asking), self.k_norm(key), value, bias, self.scale, keep_mask)

    def project_queries(self, x: Float[Tensor, "b q c"]) -> Float[Tensor, "b h q d"]:
        """Compute only the queries (B, heads, Q, D) of tokens (B, Q, C)."""
        return self.q_norm(self._split(self._project(x, slice(self.attn_dim)), 1)[0])

    def attend(self, state: AttentionState, x: Float[Tensor, "b q c"]) -> Float[Tensor, "b q c"]:
        """Return the attention output (B, Q, C), projected. x holds the normalized tokens of the Q queries."""
        return self.project_out(self.weighted_values(state), x)

    def weighted_values(self, state: AttentionState) -> Float[Tensor, "b h q d"]:
        """Return the values, weighted by attention (B, heads, Q, D)."""
        dropout = self.attn_drop.p if self.training else 0.0
        query, key, value = state.query, state.key, state.value
        if state.keep_mask is not None:
            weights = state.attention_rows(query.shape[2]).to(value.dtype)
            return F.dropout(weights, dropout) @ value
        bias = None if state.bias is None else state.bias.to(query.dtype)
        if query.device.type == "cpu" and (dropout or self._has_slow_backward(key)):
            # The CPU has no fused kernel with dropout, and torch's fallback copies everything to float32.
            logits = (query * self.scale) @ key.transpose(-2, -1)
            weights = (logits if bias is None else logits + bias).softmax(dim=-1)
            return F.dropout(weights, dropout) @ value
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)

    def project_out(self, values: Float[Tensor, "b h q d"], x: Float[Tensor, "b q c"]) -> Float[Tensor, "b q c"]:
        """Project the weighted values (B, heads, Q, D) of normalized tokens x to the attention output (B, Q, C)."""
        out = self.norm(values.transpose(1, 2).reshape(x.shape[0], -1, self.attn_dim))
        if self.gate is not None:
            out = out * torch.sigmoid(self.gate(x))
        return self.proj_drop(self.proj(out))

    def _split(self, projected: Float[Tensor, "b n width"], parts: int) -> tuple[Tensor, ...]:
        """Split a projection into parts of shape (B, heads, N, D)."""
        batch, count, _ = projected.shape
        return projected.reshape(batch, count, parts, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)

    def _project(self, x: Float[Tensor, "b n c"], part: slice) -> Float[Tensor, "b n width"]:
        """Compute a part of the joint projection to queries, keys and values."""
        if type(self.qkv) is not nn.Linear:  # for example with a low-rank adapter, whose weight is not all of it
            return self.qkv(x)[..., part]
        bias = None if self.qkv.bias is None else self.qkv.bias[part]
        return F.linear(x, self.qkv.weight[part], bias)

    def _has_slow_backward(self, key: Float[Tensor, "b h n d"]) -> bool:
        # In half precision the backward of the CPU's fused kernel took 5 times as long as the explicit one at 65
        # tokens and twice as long at 197. Beyond 785 tokens both took equally long.
        return self.training and torch.is_grad_enabled() and key.dtype != torch.float32 and key.shape[2] <= 512


def masked_softmax(logits: Float[Tensor, "b h q n"], keep_mask: Float[Tensor, "b n"]) -> Float[Tensor, "b h q n"]:
    """Compute a softmax over the kept tokens that passes a gradient to the keep mask, also where it is 0.

    Every token also attends to itself. This is DynamicViT's masked softmax (Rao et al. 2021, equation 11), with the
    epsilon of the official code, which keeps a row from being 0 / 0.

    Args:
        logits: Attention logits of the first Q of N tokens (B, heads, Q, N).
        keep_mask: 1 for kept tokens and 0 for dropped ones (B, N).
    """
    rows, count = logits.shape[2], logits.shape[3]
    diagonal = torch.eye(rows, count, dtype=keep_mask.dtype, device=keep_mask.device)
    weights = (logits - logits.amax(dim=-1, keepdim=True)).exp()
    weights = weights * (keep_mask[:, None, None] + (1 - keep_mask[:, None, None]) * diagonal)
    return (weights + EPS / count) / (weights.sum(dim=-1, keepdim=True) + EPS)


def autocast_disabled(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which matrix products keep the type of their factors, even under autocast."""
    # The device "meta" has no autocast. Its name is compared, since torch.compile of torch 2.11 cannot trace
    # torch.amp.is_autocast_available.
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _single_row(query: Float[Tensor, "b h 1 d"], key: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h 1 n"]:
    """Compute the logits of one query per head as a single matrix product over all heads.

    The keys of all heads lie side by side in memory, so that a product per head would copy them first. On a CPU
    this was measured to be 2 to 5 times faster for batches of 4 to 64 images, though slower for one (by 0.03 ms). With
    the factors swapped, the same product takes 2 to 4 times as long.
    """
    return (block_diagonal(query[:, :, 0]) @ key.transpose(1, 2).flatten(2).transpose(1, 2))[:, :, None]


def block_diagonal(query: Float[Tensor, "b h d"]) -> Float[Tensor, "b h c"]:
    """Return one query per head as rows of length C that are zero for the keys of other heads."""
    eye = torch.eye(query.shape[1], dtype=query.dtype, device=query.device)
    return (query[:, :, None] * eye[..., None]).flatten(2)
