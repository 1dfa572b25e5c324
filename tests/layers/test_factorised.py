"""Blocks of ViViT's models 3 and 4: their attention, compared with explicit masks in float64, and errors."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor

from fewtokens.errors import FewtokensError
from fewtokens.layers.attention import Attention
from fewtokens.layers.factorised import DotProductBlock, FactorisedBlock, SelfAttentionBlock
from fewtokens.tokens import Tokens

DIM, HEADS = 12, 4
SIZES = [(3, 4), (1, 4), (3, 1), (2, 2), (1, 1)]  # time steps and positions


def build(kind: type, frames: int, **settings: Any) -> FactorisedBlock:
    torch.manual_seed(0)
    layer = kind(frames, dim=DIM, num_heads=HEADS, qkv_bias=True, attn_layer=Attention, **settings).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def clip(frames: int, positions: int) -> Tokens:
    generator = torch.Generator().manual_seed(0)
    return Tokens(torch.randn(2, frames * positions, DIM, generator=generator).double(), frames=frames)


def attended(layer: Attention, x: Tensor, seen: Tensor) -> Tensor:
    """Compute attention in one sequence (N, C) under a mask (heads, N, N), head by head."""
    query, key, value = layer.qkv(x).reshape(len(x), 3, HEADS, -1).unbind(1)
    out = torch.zeros(len(x), HEADS, DIM // HEADS, dtype=x.dtype)
    for head in range(HEADS):
        logits = query[:, head] @ key[:, head].T / (DIM // HEADS) ** 0.5
        out[:, head] = logits.masked_fill(~seen[head], float("-inf")).softmax(dim=1) @ value[:, head]
    return layer.proj(out.flatten(1))


def masks(frames: int, positions: int) -> tuple[Tensor, Tensor]:
    """Return the masks (heads, N, N) of tokens in the same time step, and of tokens at the same position."""
    step = torch.arange(frames * positions) // positions
    position = torch.arange(frames * positions) % positions
    return tuple((t[:, None] == t).expand(HEADS, -1, -1) for t in (step, position))


@torch.no_grad()
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("time_first", [False, True])
def test_model_3_is_two_masked_attentions_one_after_the_other(sizes: tuple[int, int], time_first: bool) -> None:
    layer, tokens = build(SelfAttentionBlock, sizes[0], time_first=time_first), clip(*sizes)
    space, time = masks(*sizes)
    for sample, out in zip(tokens.x, layer(tokens).x, strict=True):
        parts = [(layer.attn, layer.norm1, space), (layer.attn_time, layer.norm_time, time)]
        for attention, norm, seen in reversed(parts) if time_first else parts:
            sample = sample + attended(attention, norm(sample), seen)
        torch.testing.assert_close(out, sample + layer.mlp(layer.norm2(sample)))


@torch.no_grad()
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_model_4_is_one_attention_whose_heads_have_two_masks(sizes: tuple[int, int]) -> None:
    layer, tokens = build(DotProductBlock, sizes[0]), clip(*sizes)
    space, time = masks(*sizes)
    seen = torch.cat([time[: HEADS // 2], space[HEADS // 2 :]])
    for sample, out in zip(tokens.x, layer(tokens).x, strict=True):
        sample = sample + attended(layer.attn, layer.norm1(sample), seen)
        torch.testing.assert_close(out, sample + layer.mlp(layer.norm2(sample)))


@torch.no_grad()
@pytest.mark.parametrize("kind", [SelfAttentionBlock, DotProductBlock])
@pytest.mark.parametrize("settings", [{"init_values": 0.1}, {"qk_norm": True}, {"scale_attn_norm": True}], ids=str)
def test_timms_settings_reach_both_attentions(kind: type, settings: dict[str, Any]) -> None:
    layer = build(kind, 3, norm_layer=torch.nn.LayerNorm, **settings)
    assert layer(clip(3, 4)).x.isfinite().all()
    names = {name for name, _ in layer.named_parameters()}
    ordinary = TimmBlock(DIM, HEADS, qkv_bias=True, norm_layer=torch.nn.LayerNorm, **settings)
    assert {name for name, _ in ordinary.named_parameters()} <= names
    if kind is SelfAttentionBlock:
        spatial = {n for n in names if n.startswith(("attn.", "norm1.", "ls1."))}
        over_time = {n.replace("1.", "_time.").replace("attn.", "attn_time.") for n in spatial}
        assert over_time == {n for n in names if "_time." in n}


def test_the_two_attentions_of_model_3_start_with_different_values_and_both_learn() -> None:
    torch.manual_seed(0)
    layer = SelfAttentionBlock(3, dim=DIM, num_heads=HEADS, qkv_bias=True, attn_layer=Attention).double()
    assert not torch.equal(layer.attn.qkv.weight, layer.attn_time.qkv.weight)
    layer(clip(3, 4)).x.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_stochastic_depth_and_dropout_act_in_training_only() -> None:
    for kind in (SelfAttentionBlock, DotProductBlock):
        layer, tokens = build(kind, 3, drop_path=0.5, attn_drop=0.3, proj_drop=0.3), clip(3, 4)
        assert not torch.equal(layer.train()(tokens).x, layer(tokens).x)
        assert torch.equal(layer.eval()(tokens).x, layer(tokens).x)
    dropped = build(SelfAttentionBlock, 3, drop_path=0.9999).train()
    torch.testing.assert_close(dropped(clip(3, 4)).x, clip(3, 4).x)


@torch.no_grad()
@pytest.mark.parametrize("kind", [SelfAttentionBlock, DotProductBlock])
def test_half_precision(kind: type) -> None:
    layer, tokens = build(kind, 3), clip(3, 4)
    exact = layer(tokens).x
    rough = layer.bfloat16()(tokens.update(tokens.x.bfloat16())).x
    assert rough.dtype == torch.bfloat16
    assert (rough.double() - exact).abs().max() < 0.05 * exact.abs().max()


@torch.no_grad()
def test_the_state_of_model_3_is_that_of_spatial_attention() -> None:
    layer, tokens = build(SelfAttentionBlock, 3), clip(3, 4)
    _, state = layer.attend(tokens)
    assert state.attention_rows(1).shape == (2 * 3, HEADS, 1, 4)


@pytest.mark.parametrize("kind", [SelfAttentionBlock, DotProductBlock])
@pytest.mark.parametrize(
    "change",
    [
        {"frames": 1},
        {"prefix": 3},
        {"mask": torch.ones(2, 12, dtype=torch.bool)},
        {"size": torch.ones(2, 12, dtype=torch.float64)},
        {"keep_mask": torch.ones(2, 12, dtype=torch.float64)},  # this attention would ignore it
    ],
    ids=lambda c: next(iter(c)),
)
def test_tokens_that_are_not_the_same_in_every_time_step_are_an_error(kind: type, change: dict[str, Any]) -> None:
    prefix, frames = change.get("prefix", 0), change.get("frames", 3)
    said = (
        r"^Attention over time needs 3 time steps with the same patch tokens, none of them dropped, merged or padded, "
        rf"got {12 - prefix} patch tokens in {frames} time steps and {prefix} other tokens\. Set backbone\.model="
    )
    with pytest.raises(FewtokensError, match=said):
        build(kind, 3)(replace(clip(3, 4), **change))


def test_choosing_in_the_block_is_an_error() -> None:
    with pytest.raises(FewtokensError, match=r"^Attention over time needs 3 time steps with the same patch tokens"):
        build(SelfAttentionBlock, 3).attend(clip(3, 4), lambda state: (torch.zeros(2, 1).long(), None))


def test_an_odd_number_of_heads_is_an_error() -> None:
    said = r"^`backbone\.heads` must be even, since half attend over time, got 3\.$"
    with pytest.raises(FewtokensError, match=said):
        DotProductBlock(3, dim=DIM, num_heads=3, qkv_bias=True, attn_layer=Attention)
