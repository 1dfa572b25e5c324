"""The record of tokens that every backbone passes from layer to layer."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.utils import _pytree

from fewtokens.errors import FewtokensError


# Without eq, two records are equal only if they are the same object: tensors have no truth value.
@dataclass(frozen=True, eq=False)
class Tokens:
    """A batch of token sequences, with what is known about each token. An image is a clip with one frame.

    The record is immutable: every method returns a new one. It is a registered pytree, so that module hooks,
    `torch.utils.checkpoint` and FSDP see the tensors in it.

    Args:
        x: Features (B, P+N, C): the class and register tokens, then the patch tokens, frame by frame.
        prefix: Number P of leading tokens (class, distillation, register) that no tokenizer may change.
        frames: Number T of time steps in which the N patch tokens are laid out; N is a multiple of T.
        grid: Height and width (H, W) of the grid of patches within a frame, in row-major order; None once tokens were
            dropped or merged.
        size: Number of patches that each token represents (B, P+N); None if every token represents one.
        mask: False where a token is padding (B, P+N); None if there is no padding.
        origin: Share of every input patch in every patch token (B, N, patches); None unless it is traced.
        keep_mask: 1 where a token is kept and 0 where it is dropped (B, P+N), with a gradient. Set only in training, by
            methods that learn the decision (DynamicViT) and leave all tokens in the batch; otherwise None.
        trace: List that collects the record after every block; None unless it is traced.
        size_bias: Whether sizes bias attention. They always count in merging and pooling.
    """

    x: Float[Tensor, "b n c"]
    prefix: int = 0
    frames: int = 1
    grid: tuple[int, int] | None = None
    size: Float[Tensor, "b n"] | None = None
    mask: Bool[Tensor, "b n"] | None = None
    origin: Float[Tensor, "b m patches"] | None = None
    keep_mask: Float[Tensor, "b n"] | None = None
    trace: "list[Tokens] | None" = None
    size_bias: bool = True

    @property
    def patches(self) -> Float[Tensor, "b m c"]:
        """Return the patch tokens (B, N, C)."""
        return self.x[:, self.prefix :] if self.prefix else self.x

    @property
    def num_patches(self) -> int:
        """Return the number N of patch tokens, over all frames and including padding."""
        return self.x.shape[1] - self.prefix

    @property
    def per_frame(self) -> Float[Tensor, "bt m c"]:
        """Return the patch tokens with the frames in the batch dimension (B*T, N/T, C)."""
        return self.patches.reshape(self.x.shape[0] * self.frames, -1, self.x.shape[2])

    @property
    def sizes(self) -> Float[Tensor, "b n"]:
        """Return the number of patches that each token represents (B, P+N), also where `size` is None."""
        return torch.ones_like(self.x[..., 0], dtype=torch.float32) if self.size is None else self.size

    def require_grid(self, method: str) -> tuple[int, int]:
        """Return the grid (H, W) of a frame.

        Args:
            method: Name of the method that cannot work without a grid, for the error message.

        Raises:
            FewtokensError: An earlier tokenizer dropped or merged tokens, so that neighbors are unknown.
        """
        if self.grid is None or self.mask is not None:
            raise FewtokensError(
                f"{method} needs patch tokens on a complete (height, width) grid, but an earlier tokenizer dropped or "
                f"merged some and left {self.num_patches}. Place it before that tokenizer, or use token_learner_v11."
            )
        return self.grid

    def update(self, x: Float[Tensor, "b n c"]) -> "Tokens":
        """Return the same tokens with new features."""
        # Not dataclasses.replace, which takes several times as long: this is called twice in every block.
        return Tokens(
            x,
            self.prefix,
            self.frames,
            self.grid,
            self.size,
            self.mask,
            self.origin,
            self.keep_mask,
            self.trace,
            self.size_bias,
        )

    def resample(
        self,
        patches: Float[Tensor, "b s c"],
        weights: Float[Tensor, "b s m"] | None,
        grid: tuple[int, int] | None = None,
    ) -> "Tokens":
        """Replace the patch tokens by mixtures of them and leave the prefix as it is.

        Args:
            patches: The new tokens (B, S, C), frame by frame.
            weights: Share of every old patch token in each new one (B, S, N). It is read only to update `origin`, which
                becomes None if the weights are None.
            grid: The grid of the new tokens within a frame, if they form one.
        """
        patches = patches.to(self.x.dtype)  # Under autocast they may be bfloat16; the residual stream keeps its type.
        x = torch.cat([self.x[:, : self.prefix], patches], dim=1) if self.prefix else patches
        origin = (
            None if self.origin is None or weights is None else weights.detach().to(self.origin.dtype) @ self.origin
        )
        size = None if self.size is None else torch.ones_like(x[..., 0])
        return replace(self, x=x, grid=grid, size=size, mask=None, origin=origin, keep_mask=None)

    def resample_per_frame(
        self, patches: Float[Tensor, "bt s c"], weights: Float[Tensor, "bt s m"], grid: tuple[int, int] | None = None
    ) -> "Tokens":
        """Do what `resample` does, for tokens (B*T, S, C) and weights (B*T, S, N/T) in the layout of `per_frame`."""
        batch = self.x.shape[0]
        if self.origin is None:
            return self.resample(patches.reshape(batch, -1, patches.shape[2]), None, grid)
        if self.frames > 1:
            # A token has no share in the patches of other frames: the weights are block-diagonal.
            blocks = weights.unflatten(0, (batch, self.frames))
            eye = torch.eye(self.frames, dtype=weights.dtype, device=weights.device)
            weights = torch.einsum("btsm,tu->btsum", blocks, eye).flatten(3).flatten(1, 2)
        return self.resample(patches.reshape(batch, -1, patches.shape[2]), weights, grid)

    def select(self, index: Int[Tensor, "b k"], mask: Bool[Tensor, "b k"] | None = None) -> "Tokens":
        """Keep some patch tokens, in the given order, and the prefix. The result has no grid and a single frame.

        Args:
            index: Positions among the patch tokens (B, K).
            mask: False where an entry of `index` is padding (B, K); None if none is.
        """
        rows = self.rows(index)
        x = take(self.x, rows)
        size = None if self.size is None else self.size.gather(1, rows)
        keep_mask = None if self.keep_mask is None else self.keep_mask.gather(1, rows)
        kept = None if self.mask is None else self.mask.gather(1, rows)
        if mask is not None:
            whole = with_prefix(mask, self.prefix)
            kept = whole if kept is None else kept & whole
        origin = self.origin
        if origin is not None:
            origin = take(origin, index)
            origin = origin if mask is None else origin * mask[..., None]
        return replace(self, x=x, frames=1, grid=None, size=size, mask=kept, origin=origin, keep_mask=keep_mask)

    def rows(self, index: Int[Tensor, "b k"]) -> Int[Tensor, "b p_k"]:
        """Return the positions among all tokens (B, P+K) of the prefix and of the patch tokens at `index` (B, K)."""
        lead = torch.arange(self.prefix, device=index.device).expand(index.shape[0], -1)
        return torch.cat([lead, index + self.prefix], dim=1)

    def merge(self, keep: Int[Tensor, "b k"], source: Int[Tensor, "b r"], target: Int[Tensor, "b r"]) -> "Tokens":
        """Merge patch tokens into others: features become means weighted by size, and sizes add up.

        The prefix stays. The result has no grid and a single frame. The tokens must not contain padding.

        Args:
            keep: Positions among the patch tokens that stay, in their new order (B, K).
            source: Positions that are merged away (B, R). `keep` and `source` together hold every position once.
            target: Index into `keep` of the token that each source is merged into (B, R). Several may share one.
        """
        rows, gone, into = self.rows(keep), source + self.prefix, target + self.prefix
        sizes = self.sizes
        weight = sizes.gather(1, gone)
        size = sizes.gather(1, rows).scatter_add(1, into, weight)
        share = (weight / size.gather(1, into))[..., None]

        def means(all_: Tensor, kept: Tensor, left: Tensor, slots: Tensor) -> Tensor:
            # Only the few slots that change are touched: each moves from its value to the mean. At least float32 is
            # needed, since bfloat16 cannot represent a size of 257.
            stays = take(all_, kept)
            wide = stays.to(torch.promote_types(stays.dtype, torch.float32))
            change = (take(all_, left).to(wide.dtype) - take(wide, slots)) * share.to(wide.dtype)
            wide.flatten(0, 1).index_add_(0, _flat(wide, slots), change.flatten(0, 1))  # `take` returned a copy
            return wide.to(stays.dtype)

        x = means(self.x, rows, gone, into)
        origin = None if self.origin is None else means(self.origin, keep, source, target)
        return replace(self, x=x, frames=1, grid=None, size=size, origin=origin)

    def join(self, other: "Tokens") -> "Tokens":
        """Append the patch tokens of another record of the same samples; the prefix of the other is dropped.

        `size`, `origin` and `keep_mask` must be set in both records or in neither. The result has no grid and a single
        frame.
        """
        start = other.prefix

        def both(mine: Tensor | None, theirs: Tensor | None, first: int) -> Tensor | None:
            return None if mine is None or theirs is None else torch.cat([mine, theirs[:, first:]], dim=1)

        mask = self.mask
        if mask is not None or other.mask is not None:
            masks = [
                torch.ones_like(t.x[..., 0], dtype=torch.bool) if t.mask is None else t.mask for t in (self, other)
            ]
            mask = torch.cat([masks[0], masks[1][:, start:]], dim=1)
        return replace(
            self,
            x=torch.cat([self.x, other.patches], dim=1),
            frames=1,
            grid=None,
            size=both(self.size, other.size, start),
            mask=mask,
            origin=both(self.origin, other.origin, 0),
            keep_mask=both(self.keep_mask, other.keep_mask, start),
        )

    @property
    def uniform(self) -> bool:
        """Return whether all tokens count equally: no sizes, no padding, and no keep mask."""
        return self.size is None and self.mask is None and self.keep_mask is None

    def hardened(self) -> "Tokens":
        """Return the record with dropped tokens as padding, for operations that know only a mask and no keep mask."""
        if self.keep_mask is None:
            return self
        kept = self.keep_mask.detach() > 0
        return replace(self, mask=kept if self.mask is None else kept & self.mask, keep_mask=None)

    def bias(self) -> Float[Tensor, "b 1 1 n"] | None:
        """Return the additive attention bias of sizes and padding (B, 1, 1, P+N); None if it is zero.

        log(size) is ToMe's proportional attention (Bolya et al. 2023, section 3), unless `size_bias` turns it off. With
        None, attention can use fused kernels that accept no mask.
        """
        size = self.size if self.size_bias else None
        if size is None and self.mask is None:
            return None
        bias = torch.zeros_like(self.x[..., 0]) if size is None else size.log().to(self.x.dtype)
        if self.mask is not None:
            bias = bias.masked_fill(~self.mask, float("-inf"))
        return bias[:, None, None, :]

    def mean(self) -> Float[Tensor, "b c"]:
        """Return the mean of the patch tokens (B, C), weighted by size and without padding."""
        if self.uniform:
            return self.patches.mean(dim=1)
        weight = self.sizes.to(self.x.dtype)
        weight = weight if self.mask is None else weight * self.mask
        weight = weight if self.keep_mask is None else weight * self.keep_mask
        weight = weight[:, self.prefix :, None]
        return (self.patches * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(torch.finfo(weight.dtype).tiny)


def take(x: Float[Tensor, "b n c"], rows: Int[Tensor, "b k"]) -> Float[Tensor, "b k c"]:
    """Gather rows of x (B, N, C) at positions (B, K) and return them as (B, K, C).

    index_select on the flattened matrix copies whole rows: measured 3 times faster on a CPU than gather.
    """
    return x.flatten(0, 1).index_select(0, _flat(x, rows)).unflatten(0, (x.shape[0], -1))


def with_prefix(values: Shaped[Tensor, "b m"], prefix: int) -> Shaped[Tensor, "b p_m"]:
    """Return values of the patch tokens (B, N) with a one for every token of the prefix in front of them (B, P+N)."""
    return torch.cat([values.new_ones(values.shape[0], prefix), values], dim=1)


def _flat(x: Float[Tensor, "b n c"], rows: Int[Tensor, "b k"]) -> Int[Tensor, "bk"]:
    """Return the positions (B*K,) of the rows in `x.flatten(0, 1)`."""
    return (rows + torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]).flatten()


def _flatten(tokens: Tokens) -> tuple[list[Any], Any]:
    tensors = [tokens.x, tokens.size, tokens.mask, tokens.origin, tokens.keep_mask]
    return tensors, (tokens.prefix, tokens.frames, tokens.grid, tokens.trace, tokens.size_bias)


def _unflatten(tensors: Any, context: Any) -> Tokens:
    x, size, mask, origin, keep_mask = tensors
    prefix, frames, grid, trace, bias = context  # The trace is passed on as the same list, which collects the records.
    names = ("x", "prefix", "frames", "grid", "size", "mask", "origin", "keep_mask", "trace", "size_bias")
    values = (x, prefix, frames, grid, size, mask, origin, keep_mask, trace, bias)
    # Not by the constructor, whose types tests check: torch also maps functions over a tree that return no tensors.
    tokens = object.__new__(Tokens)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(tokens, name, value)
    return tokens


_pytree.register_pytree_node(Tokens, _flatten, _unflatten, serialized_type_name="fewtokens.tokens.Tokens")
