"""Blocks that factorise attention into space and time: models 3 and 4 of ViViT.

Arnab et al., "ViViT: A Video Vision Transformer", ICCV 2021 (arXiv 2103.15691), section 3.3, as implemented in scenic.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewtokens.errors import FewtokensError, check
from fewtokens.layers.attention import Attention, AttentionState
from fewtokens.layers.block import Block, Choose
from fewtokens.tokens import Tokens

USE_INSTEAD = (
    "Set backbone.model=spatio_temporal or factorised_encoder, or use a tokenizer that keeps the time steps, such as "
    "token_learner."
)


class FactorisedBlock(Block):
    """Base of the blocks that attend over time, and therefore need the same tokens in every time step.

    Args:
        frames: Number T of time steps.
        settings: Arguments of timm's Block.
    """

    def __init__(self, frames: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.frames = frames

    def attend(self, tokens: Tokens, choose: Choose | None = None) -> tuple[Tokens, AttentionState]:
        """Compute attention within time steps and over time.

        Raises:
            FewtokensError: A tokenizer has dropped, merged or padded tokens, or wants to drop some in this block.
        """
        complete = tokens.frames == self.frames and tokens.prefix == 0 and tokens.uniform
        if not complete or choose is not None:
            raise FewtokensError(
                f"Attention over time needs {self.frames} time steps with the same patch tokens, none of them dropped, "
                f"merged or padded, got {tokens.num_patches} patch tokens in {tokens.frames} time steps and "
                f"{tokens.prefix} other tokens. {USE_INSTEAD}"
            )
        return self._attend(tokens)

    def _attend(self, tokens: Tokens) -> tuple[Tokens, AttentionState]:
        return super().attend(tokens)

    def _packs(self, tokens: Tokens) -> bool:
        return False  # `attend` refuses padding


class SelfAttentionBlock(FactorisedBlock):
    """Block of model 3: attention within time steps, attention over time, and an MLP.

    Each attention has its own norm and residual connection. The parameters of the spatial one have the names of an
    ordinary block. After a tokenizer that learns S tokens per time step, attention over time connects the tokens with
    the same index.

    Args:
        frames: Number T of time steps.
        time_first: Attend over time before attending within time steps, which is scenic's default. The paper has the
            other order, and reports no difference.
        settings: Arguments of timm's Block.
    """

    def __init__(self, frames: int, time_first: bool = False, **settings: Any) -> None:
        super().__init__(frames, **settings)
        temporal = Block(**settings | {"mlp_layer": nn.Identity})
        self.norm_time, self.attn_time = temporal.norm1, temporal.attn
        self.ls_time, self.drop_path_time = temporal.ls1, temporal.drop_path1
        self.time_first = time_first

    def _attend(self, tokens: Tokens) -> tuple[Tokens, AttentionState]:
        """Return the tokens and the state of the spatial attention, in which every time step is a sample."""
        if self.time_first:
            tokens = self.over_time(tokens)
        tokens, state = self.over_space(tokens)
        return tokens if self.time_first else self.over_time(tokens), state

    def over_space(self, tokens: Tokens) -> tuple[Tokens, AttentionState]:
        """Compute x + attention(norm(x)) within every time step; the state has shape (B*T, heads, N, D)."""
        x = self.norm1(tokens.per_frame)
        state = self.attn.project_qkv(x, None)
        out = self.attn.attend(state, x).reshape(tokens.x.shape)
        return tokens.update(tokens.x + self.drop_path1(self.ls1(out))), state

    def over_time(self, tokens: Tokens) -> Tokens:
        """Compute x + attention(norm(x)) over the time steps of every position."""
        batch, frames = tokens.x.shape[0], self.frames
        x = self.norm_time(tokens.x).unflatten(1, (frames, -1)).transpose(1, 2).flatten(0, 1)
        out = self.attn_time.attend(self.attn_time.project_qkv(x, None), x)
        out = out.unflatten(0, (batch, -1)).transpose(1, 2).flatten(1, 2)
        return tokens.update(tokens.x + self.drop_path_time(self.ls_time(out)))


class DotProductAttention(Attention):
    """Attention of model 4: the first half of the heads attends over time, the second half within time steps."""

    frames: int = 1

    def weighted_values(self, state: AttentionState) -> Float[Tensor, "b h q d"]:
        """Return the values, weighted over time and within time steps (B, heads, Q, D)."""
        half = self.num_heads // 2
        over_time, over_space = self._along(state, slice(half), 3), self._along(state, slice(half, None), 2)
        return torch.cat([over_time, over_space], dim=1)

    def _along(self, state: AttentionState, heads: slice, batch_dim: int) -> Float[Tensor, "b h q d"]:
        """Attend with some heads; of (B, heads, T, N, D), the dimension not attended over is moved into the batch."""
        batch = state.query.shape[0]
        query, key, value = (
            t[:, heads].unflatten(2, (self.frames, -1)).movedim(batch_dim, 1).flatten(0, 1)
            for t in (state.query, state.key, state.value)
        )
        out = super().weighted_values(replace(state, query=query, key=key, value=value))
        return out.unflatten(0, (batch, -1)).movedim(1, batch_dim).flatten(2, 3)


class DotProductBlock(FactorisedBlock):
    """Block of model 4. Its attention state holds queries, keys and values of all heads, temporal and spatial.

    Args:
        frames: Number T of time steps.
        settings: Arguments of timm's Block; the number of heads must be even.
    """

    def __init__(self, frames: int, **settings: Any) -> None:
        check(
            settings["num_heads"] % 2 == 0, "backbone.heads", "even, since half attend over time", settings["num_heads"]
        )
        super().__init__(frames, **settings | {"attn_layer": DotProductAttention})
        assert isinstance(self.attn, DotProductAttention)
        self.attn.frames = frames
