"""Blocks that attend within time steps and over time instead of everywhere: ViViT's models 3 and 4.

Arnab et al., ICCV 2021, sections 3.3 "Model 3" and "Model 4"; scenic's code.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewtokens.errors import FewtokensError
from fewtokens.layers.attention import Attention, Evidence
from fewtokens.layers.block import Block, Choice
from fewtokens.tokens import Tokens


class FactorisedBlock(Block):
    """A block whose attention needs to know which token is which: as many in every time step, in the same order.

    Args:
        frames: Time steps T.
        settings: Of timm's Block.
    """

    def __init__(self, frames: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.frames = frames

    def attend(self, tokens: Tokens, choose: Callable[[Evidence], Choice] | None = None) -> tuple[Tokens, Evidence]:
        """Attention within time steps and over time.

        Raises:
            FewtokensError: Tokens were dropped or merged, sized or padded before, or are to be chosen here.
        """
        whole = tokens.frames == self.frames and tokens.prefix == 0 and tokens.uniform
        if not whole or choose is not None:
            raise FewtokensError(
                "Attention over time needs the same tokens in every time step",
                expected=f"{self.frames} time steps of patch tokens, none of them dropped, merged or padded",
                got=f"{tokens.num_patches} patch tokens in {tokens.frames} time steps, and {tokens.prefix} others",
                fix="set backbone.model=spatio_temporal or factorised_encoder, or tokenizer=token_learner",
            )
        return self._attend(tokens)

    def _attend(self, tokens: Tokens) -> tuple[Tokens, Evidence]:
        return super().attend(tokens)


class SelfAttentionBlock(FactorisedBlock):
    """Model 3: two attentions, one within time steps, one of every position over time, and an MLP.

    Each attention has a norm of its own and is added by itself; the spatial one has the names of an ordinary block.
    After a tokenizer that learns S tokens per time step, "position" is which of the S it is.

    Args:
        frames: Time steps T.
        time_first: Over time before within time steps (scenic's default); the paper has it the other way round, and
            found no difference.
        settings: Of timm's Block.
    """

    def __init__(self, frames: int, time_first: bool = False, **settings: Any) -> None:
        super().__init__(frames, **settings)
        twin = Block(**settings | {"mlp_layer": nn.Identity})
        self.norm_time, self.attn_time, self.ls_time, self.drop_path_time = (
            twin.norm1,
            twin.attn,
            twin.ls1,
            twin.drop_path1,
        )
        self.time_first = time_first

    def _attend(self, tokens: Tokens) -> tuple[Tokens, Evidence]:
        """The evidence is that of space, every time step a sample."""
        if self.time_first:
            tokens = self.over_time(tokens)
        tokens, evidence = self.over_space(tokens)
        return tokens if self.time_first else self.over_time(tokens), evidence

    def over_space(self, tokens: Tokens) -> tuple[Tokens, Evidence]:
        """x + attention(norm(x)) within every time step, and what it saw (B*T, heads, N, D)."""
        x = self.norm1(tokens.per_frame)
        evidence = self.attn.observe(x, None)
        mixed = self.attn.mix(evidence, x).reshape(tokens.x.shape)
        return tokens.update(tokens.x + self.drop_path1(self.ls1(mixed))), evidence

    def over_time(self, tokens: Tokens) -> Tokens:
        """x + attention(norm(x)) of every position over the time steps."""
        batch, frames = tokens.x.shape[0], self.frames
        x = self.norm_time(tokens.x).unflatten(1, (frames, -1)).transpose(1, 2).flatten(0, 1)
        mixed = self.attn_time.mix(self.attn_time.observe(x, None), x)
        mixed = mixed.unflatten(0, (batch, -1)).transpose(1, 2).flatten(1, 2)
        return tokens.update(tokens.x + self.drop_path_time(self.ls_time(mixed)))


class DotProductAttention(Attention):
    """Model 4: the first half of the heads attends over time, the second within time steps; the rest is as ever."""

    frames: int = 1

    def _attend(self, evidence: Evidence) -> Float[Tensor, "b h q d"]:
        half = self.num_heads // 2
        over_time, over_space = self._along(evidence, slice(half), 3), self._along(evidence, slice(half, None), 2)
        return torch.cat([over_time, over_space], dim=1)

    def _along(self, evidence: Evidence, heads: slice, other: int) -> Float[Tensor, "b h q d"]:
        """What some heads mix; of (B, heads, T, N, D), the axis that they do not attend along goes to the samples."""
        batch = evidence.query.shape[0]
        query, key, value = (
            t[:, heads].unflatten(2, (self.frames, -1)).movedim(other, 1).flatten(0, 1)
            for t in (evidence.query, evidence.key, evidence.value)
        )
        mixed = super()._attend(replace(evidence, query=query, key=key, value=value))
        return mixed.unflatten(0, (batch, -1)).movedim(1, other).flatten(2, 3)


class DotProductBlock(FactorisedBlock):
    """Model 4's block. Its evidence holds queries, keys and values of all heads, each of which looked along one axis.

    Args:
        frames: Time steps T.
        settings: Of timm's Block; an even number of heads.
    """

    def __init__(self, frames: int, **settings: Any) -> None:
        super().__init__(frames, **settings | {"attn_layer": DotProductAttention})
        assert isinstance(self.attn, DotProductAttention)
        self.attn.frames = frames
        if settings["num_heads"] % 2:
            raise FewtokensError(
                "Half of the heads attend over time, half over space",
                expected="an even number of heads",
                got=settings["num_heads"],
                fix="set backbone.heads=12",
            )
