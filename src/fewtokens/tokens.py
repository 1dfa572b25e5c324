"""Tokens: the one record that flows through every backbone."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fewtokens.errors import FewtokensError


@dataclass(frozen=True)
class Tokens:
    """A batch of token sequences and what is known of them. An image is a clip of one frame.

    Args:
        x: Features (B, P+N, C): class and register tokens first, then patches, frame by frame.
        prefix: P, the leading tokens that no tokenizer may touch.
        frames: T, the frames in which the N patches are laid out; N is a multiple of T.
        grid: (H, W), the lattice within a frame, row-major; None once it is broken.
        size: How many patches each token stands for (B, P+N); None where every token stands for one.
        mask: False where a slot is padding (B, P+N); None where there is none.
        origin: Share of every input patch in every patch token (B, N, patches); None unless it was asked for.
        keep: 1 where a token stays and 0 where it goes (B, P+N), with a gradient: the decisions of a method that learns
            them (DynamicViT), in training alone, where all tokens stay in the batch; else None.
        trace: Collects the record after every block; None unless it was asked for.
    """

    x: Float[Tensor, "b n c"]
    prefix: int = 0
    frames: int = 1
    grid: tuple[int, int] | None = None
    size: Float[Tensor, "b n"] | None = None
    mask: Bool[Tensor, "b n"] | None = None
    origin: Float[Tensor, "b m patches"] | None = None
    keep: Float[Tensor, "b n"] | None = None
    trace: "list[Tokens] | None" = None

    @property
    def patches(self) -> Float[Tensor, "b m c"]:
        """The tokens without the prefix (B, N, C)."""
        return self.x[:, self.prefix :] if self.prefix else self.x

    @property
    def num_patches(self) -> int:
        """N, the tokens without the prefix, all frames together, padding included."""
        return self.x.shape[1] - self.prefix

    @property
    def per_frame(self) -> Float[Tensor, "bt m c"]:
        """The patches with every frame as a sample of its own (B*T, N/T, C)."""
        return self.patches.reshape(self.x.shape[0] * self.frames, -1, self.x.shape[2])

    def lattice(self, asked_by: str) -> tuple[int, int]:
        """The grid (H, W) of a frame, for methods that cannot do without.

        Raises:
            FewtokensError: The lattice is broken or has padding, so that neighbours are no longer known.
        """
        if self.grid is None or self.mask is not None:
            raise FewtokensError(
                f"{asked_by} needs patches on a lattice",
                expected="an intact (height, width) grid of patches",
                got=f"{self.num_patches} patch tokens whose lattice an earlier tokenizer broke",
                fix="place it before every tokenizer that drops or merges tokens, or use token_learner_v11",
            )
        return self.grid

    def update(self, x: Float[Tensor, "b n c"]) -> "Tokens":
        """The same tokens with new features."""
        # Spelt out: `replace` takes several times as long, and this is called twice in every block.
        return Tokens(
            x, self.prefix, self.frames, self.grid, self.size, self.mask, self.origin, keep=self.keep, trace=self.trace
        )

    def resample(
        self,
        patches: Float[Tensor, "b s c"],
        weights: Float[Tensor, "b s m"] | None,
        grid: tuple[int, int] | None = None,
    ) -> "Tokens":
        """New patch tokens in place of the old, each a mixture of them; the prefix stays as it is.

        Args:
            patches: The new tokens (B, S, C), frame by frame.
            weights: What of every old patch token went into each new one (B, S, N); read only for `origin`,
                which is lost where it is None.
            grid: The lattice of the new tokens within a frame, if they have one.
        """
        patches = patches.to(self.x.dtype)  # autocast may hand in bfloat16; the residual stream stays as it is
        x = torch.cat([self.x[:, : self.prefix], patches], dim=1) if self.prefix else patches
        origin = (
            None if self.origin is None or weights is None else weights.detach().to(self.origin.dtype) @ self.origin
        )
        size = None if self.size is None else torch.ones_like(x[..., 0])
        return replace(self, x=x, grid=grid, size=size, mask=None, origin=origin, keep=None)

    def resample_per_frame(
        self, patches: Float[Tensor, "bt s c"], weights: Float[Tensor, "bt s m"], grid: tuple[int, int] | None = None
    ) -> "Tokens":
        """`resample` with every frame as a sample of its own, as `per_frame` gave them (B*T, S, C)."""
        batch = self.x.shape[0]
        if self.origin is None:
            return self.resample(patches.reshape(batch, -1, patches.shape[2]), None, grid)
        if self.frames > 1:
            # A frame's tokens hold nothing of the other frames: the weights are blocks on a diagonal.
            blocks = weights.unflatten(0, (batch, self.frames))
            eye = torch.eye(self.frames, dtype=weights.dtype, device=weights.device)
            weights = torch.einsum("btsm,tu->btsum", blocks, eye).flatten(3).flatten(1, 2)
        return self.resample(patches.reshape(batch, -1, patches.shape[2]), weights, grid)

    def select(self, index: Int[Tensor, "b k"], mask: Bool[Tensor, "b k"] | None = None) -> "Tokens":
        """Keep some patch tokens, in the order given; the prefix stays. The lattice and the frames are lost.

        Args:
            index: Positions among the patch tokens (B, K).
            mask: False where a slot of `index` is padding; None where all are real.
        """
        batch, prefix = self.x.shape[0], self.prefix
        rows = self.rows(index)
        x = take(self.x, rows)
        size = None if self.size is None else self.size.gather(1, rows)
        keep = None if self.keep is None else self.keep.gather(1, rows)
        kept = None if self.mask is None else self.mask.gather(1, rows)
        if mask is not None:
            whole = torch.cat([mask.new_ones(batch, prefix), mask], dim=1)
            kept = whole if kept is None else kept & whole
        origin = self.origin
        if origin is not None:
            origin = take(origin, index)
            origin = origin if mask is None else origin * mask[..., None]
        return replace(self, x=x, frames=1, grid=None, size=size, mask=kept, origin=origin, keep=keep)

    def rows(self, index: Int[Tensor, "b k"]) -> Int[Tensor, "b p_k"]:
        """Positions among all tokens (B, P+K): the prefix, then the patches that `index` names (B, K)."""
        lead = torch.arange(self.prefix, device=index.device).expand(index.shape[0], -1)
        return torch.cat([lead, index + self.prefix], dim=1)

    def merge(self, keep: Int[Tensor, "b k"], source: Int[Tensor, "b r"], target: Int[Tensor, "b r"]) -> "Tokens":
        """Merge patch tokens into others: means in which sizes count, and the sizes add up; the prefix stays.

        The lattice and the frames are lost. Padding must not take part: a token without a size of 1 or more is none.

        Args:
            keep: Positions among the patch tokens that stay, in their new order (B, K).
            source: Positions that go (B, R); with `keep` every position once.
            target: For each of them the slot in `keep` (B, R) that it goes to; several may go to one.
        """
        rows, gone, into = self.rows(keep), source + self.prefix, target + self.prefix
        every = torch.ones_like(self.x[..., 0], dtype=torch.float32) if self.size is None else self.size
        weight = every.gather(1, gone)
        size = every.gather(1, rows).scatter_add(1, into, weight)
        share = (weight / size.gather(1, into))[..., None]

        def means(all_: Tensor, kept: Tensor, left: Tensor, slots: Tensor) -> Tensor:
            # From what was there to the mean, in the few slots that change. In float32 at least: bfloat16 cannot count
            # a token of 257 patches.
            stays = take(all_, kept)
            wide = stays.to(torch.promote_types(stays.dtype, torch.float32))
            change = (take(all_, left).to(wide.dtype) - take(wide, slots)) * share.to(wide.dtype)
            wide.flatten(0, 1).index_add_(0, _flat(wide, slots), change.flatten(0, 1))  # fresh from `take`
            return wide.to(stays.dtype)

        x = means(self.x, rows, gone, into)
        origin = None if self.origin is None else means(self.origin, keep, source, target)
        return replace(self, x=x, frames=1, grid=None, size=size, origin=origin)

    def join(self, other: "Tokens") -> "Tokens":
        """The patch tokens of another record of the same samples after the own; the prefix is the own.

        Both records have sizes, or neither, and both have an origin, or neither. The lattice and the frames are lost.
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
            keep=both(self.keep, other.keep, start),
        )

    @property
    def uniform(self) -> bool:
        """Whether all tokens count alike: no sizes, no padding, nothing on its way out."""
        return self.size is None and self.mask is None and self.keep is None

    def decided(self) -> "Tokens":
        """The record with what is on its way out as padding, for what can only leave out or not."""
        if self.keep is None:
            return self
        kept = self.keep.detach() > 0
        return replace(self, mask=kept if self.mask is None else kept & self.mask, keep=None)

    def bias(self) -> Float[Tensor, "b 1 1 n"] | None:
        """Sizes and padding as one additive attention term; None when there is nothing to add.

        None keeps the fused attention kernel without mask available. log(size) is ToMe's proportional attention.
        """
        if self.size is None and self.mask is None:
            return None
        bias = torch.zeros_like(self.x[..., 0]) if self.size is None else self.size.log().to(self.x.dtype)
        if self.mask is not None:
            bias = bias.masked_fill(~self.mask, float("-inf"))
        return bias[:, None, None, :]

    def mean(self) -> Float[Tensor, "b c"]:
        """Mean of the patch tokens (B, C), in which sizes count and padding does not."""
        if self.uniform:
            return self.patches.mean(dim=1)
        weight = torch.ones_like(self.x[..., 0]) if self.size is None else self.size.to(self.x.dtype)
        weight = weight if self.mask is None else weight * self.mask
        weight = weight if self.keep is None else weight * self.keep
        weight = weight[:, self.prefix :, None]
        return (self.patches * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(torch.finfo(weight.dtype).tiny)


def take(x: Float[Tensor, "b n c"], rows: Int[Tensor, "b k"]) -> Float[Tensor, "b k c"]:
    """Of every sample of x (B, N, C) the rows that it names (B, K), in that order: (B, K, C).

    Whole rows of one long matrix: measured 3 times faster on a CPU than gather, which takes numbers one by one.
    """
    return x.flatten(0, 1).index_select(0, _flat(x, rows)).unflatten(0, (x.shape[0], -1))


def _flat(x: Float[Tensor, "b n c"], rows: Int[Tensor, "b k"]) -> Int[Tensor, "bk"]:
    """Positions among the rows of all samples, one sample after the other."""
    return (rows + torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]).flatten()
