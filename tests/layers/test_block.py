"""Attention and Block: equality with timm, the attention state, sizes and padding."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from timm.layers.attention import Attention as TimmAttention
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

from fewtokens.layers.attention import Attention, AttentionState
from fewtokens.layers.block import Block
from fewtokens.tokens import Tokens

norm_layer = partial(nn.LayerNorm, eps=1e-6)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def block(**settings: Any) -> Block:
    torch.manual_seed(0)
    return Block(24, 3, qkv_bias=True, norm_layer=norm_layer, attn_layer=Attention, **settings)


def assert_equal(found: Any, expected: Any) -> None:
    assert torch.equal(found, expected) if isinstance(expected, Tensor) else found == expected


def explicit_attention(state: AttentionState) -> Tensor:
    """Compute softmax(q k^T / sqrt(D) + bias), one query at a time in float64."""
    query, key = state.query.double(), state.key.double()
    rows = []
    for n in range(query.shape[2]):
        logits = (query[:, :, n, None] * key).sum(dim=-1) / query.shape[3] ** 0.5
        if state.bias is not None:
            logits = logits + state.bias[:, :, 0].double()
        weights = (logits - logits.max(dim=-1, keepdim=True).values).exp()
        rows.append(weights / weights.sum(dim=-1, keepdim=True))
    return torch.stack(rows, dim=2)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"qk_norm": True}, {"scale_norm": True}, {"gated": True}], ids=str)
def test_attention_equals_timms_bit_for_bit(settings: dict[str, bool]) -> None:
    torch.manual_seed(0)
    ours = Attention(24, 3, qkv_bias=True, norm_layer=nn.LayerNorm, **settings)
    theirs = TimmAttention(24, 3, qkv_bias=True, norm_layer=nn.LayerNorm, **settings)
    theirs.load_state_dict(ours.state_dict())
    x = randn(2, 7, 24)
    assert torch.equal(ours.attend(ours.project_qkv(x, None), x), theirs(x))


@pytest.mark.parametrize("settings", [{}, {"init_values": 0.1}, {"drop_path": 0.5}, {"proj_drop": 0.3}], ids=str)
def test_block_equals_timms_bit_for_bit_in_training(settings: dict[str, float]) -> None:
    ours = block(**settings).train()
    theirs = TimmBlock(24, 3, qkv_bias=True, norm_layer=norm_layer, **settings).train()
    theirs.load_state_dict(ours.state_dict())
    x = randn(4, 7, 24)
    torch.manual_seed(1)
    expected = theirs(x)
    torch.manual_seed(1)
    assert torch.equal(ours(Tokens(x)).x, expected)


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_attention_rows_are_the_softmax_that_weights_the_values(qk_norm: bool, biased: bool) -> None:
    layer = block(qk_norm=qk_norm)
    size, mask = torch.rand(2, 6) + 0.5, torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    tokens = Tokens(randn(2, 6, 24), size=size, mask=mask) if biased else Tokens(randn(2, 6, 24))
    attended, state = layer.attend(tokens)
    weights = explicit_attention(state)
    for n in (1, 2, 6):
        rows = state.attention_rows(n)
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows, weights[:, :, :n].float())
    mixed = (state.attention_rows(6) @ state.value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attended.x, tokens.x + layer.attn.proj(mixed), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_attention_rows_of_a_half_precision_state_are_float32() -> None:
    query, key, value = (randn(1, 2, 5, 4, seed=i).bfloat16() for i in range(3))
    rows = AttentionState(query, key, value, None, scale=0.5).attention_rows(1)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.sum(dim=-1), torch.ones(1, 2, 1))


@torch.no_grad()
def test_attention_rows_under_autocast_are_float32() -> None:
    query, key, value = (randn(1, 2, 5, 4, seed=i).bfloat16() for i in range(3))
    state = AttentionState(query, key, value, None, scale=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        inside = state.attention_rows(2)
    assert torch.equal(inside, state.attention_rows(2))


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_choosing_before_attention_equals_selecting_after_it(padded: bool) -> None:
    layer = block(init_values=0.1, qk_norm=True)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 5:] = False
    tokens = Tokens(randn(2, 7, 24), prefix=2, size=randn(2, 7).abs() + 0.5, mask=mask if padded else None)
    index, kept = torch.tensor([[4, 0, 1], [2, 0, 1]]), torch.tensor([[True, True, True], [True, True, False]])
    seen: list[AttentionState] = []
    first, state = layer.attend(tokens, lambda state: seen.append(state) or (index, kept))
    after, complete = layer.attend(tokens)
    assert seen == [state]
    torch.testing.assert_close(state.query, complete.query[:, :, :2])  # only of the prefix
    torch.testing.assert_close(state.key, complete.key)
    torch.testing.assert_close(state.value, complete.value)
    after = after.select(index, kept)
    torch.testing.assert_close(first.x, after.x)
    assert torch.equal(first.mask, after.mask)
    assert torch.equal(first.size, after.size)
    assert (first.prefix, first.grid) == (2, None)


@torch.no_grad()
def test_forward_is_attend_then_feed_forward() -> None:
    layer, tokens = block(init_values=0.1), Tokens(randn(2, 5, 24))
    attended, _ = layer.attend(tokens)
    normed = layer.norm1(tokens.x)
    assert torch.equal(
        attended.x, tokens.x + layer.ls1(layer.attn.attend(layer.attn.project_qkv(normed, None), normed))
    )
    assert torch.equal(layer.feed_forward(attended).x, attended.x + layer.ls2(layer.mlp(layer.norm2(attended.x))))
    assert torch.equal(layer(tokens).x, layer.feed_forward(attended).x)


@torch.no_grad()
def test_attention_dropout_acts_in_training_only() -> None:
    layer, tokens = block(attn_drop=0.5), Tokens(randn(2, 5, 24))
    layer.eval()
    assert torch.equal(layer(tokens).x, layer(tokens).x)
    layer.train()
    assert not torch.equal(layer(tokens).x, layer(tokens).x)


@pytest.mark.parametrize("count", [5, 600])
def test_half_precision_training_follows_float32(count: int) -> None:
    """On a CPU, short sequences take another code path."""
    layer, x = block().train(), randn(2, count, 24)
    wide = layer(Tokens(x.clone().requires_grad_())).x
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(Tokens(x)).x
    torch.testing.assert_close(half, wide, atol=0.03, rtol=0.03)
    expected, found = (torch.autograd.grad(out.square().mean(), layer.attn.qkv.weight)[0] for out in (wide, half))
    assert (found - expected).norm() < 0.03 * expected.norm()


@torch.no_grad()
def test_a_block_appends_its_output_to_the_trace() -> None:
    layer, trace = block(), []
    out = layer(Tokens(randn(2, 5, 24), trace=trace))
    assert [record.x for record in trace] == [out.x]
    assert layer(Tokens(randn(2, 5, 24))).trace is None


@pytest.mark.parametrize("garbage", [0.0, 1.0, 1e4], ids=lambda g: f"garbage {g}")
@pytest.mark.parametrize("sized", [False, True], ids=["no sizes", "sizes"])
def test_padding_never_changes_real_tokens(garbage: float, sized: bool) -> None:
    """Two blocks and the mean give the same for 6 tokens alone and among 4 padding tokens of any content."""
    layers = [block(), block(qk_norm=True)]
    slots = torch.tensor([0, 1, 3, 4, 8, 9])
    real, sizes = randn(2, 6, 24), randn(2, 6, seed=3).abs() + 0.5
    padded = garbage * randn(2, 10, 24, seed=7)
    padded[:, slots] = real
    padded.requires_grad_()
    size, mask = torch.full((2, 10), 3.0), torch.zeros(2, 10, dtype=torch.bool)
    size[:, slots], mask[:, slots] = sizes, True
    alone = Tokens(real, prefix=1, size=sizes if sized else None)
    among = Tokens(padded, prefix=1, size=size if sized else None, mask=mask)
    for layer in layers:
        alone, among = layer(alone), layer(among)
    torch.testing.assert_close(among.x[:, slots], alone.x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(among.mean(), alone.mean(), rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(among.mean().sum() + among.x[:, 0].sum(), padded)
    assert gradient[:, ~mask[0]].abs().max() == 0
    assert gradient[:, slots].abs().min() > 0


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"init_values": 0.1, "qk_norm": True}, {"scale_attn_norm": True}], ids=str)
@pytest.mark.parametrize("sized", [False, True], ids=["no sizes", "sizes"])
@pytest.mark.parametrize("chosen", [None, "equal", "padded"])
@pytest.mark.parametrize("padded", [False, True], ids=["no padding", "padding"])
def test_inference_on_packed_tokens_equals_that_with_padding(
    settings: dict[str, Any], sized: bool, chosen: str | None, padded: bool
) -> None:
    layer = block(**settings).train()
    mask = torch.tensor([[True] * 6, [True, True, False, True, True, False], [True] * 3 + [False] * 3])
    tokens = Tokens(randn(3, 6, 24), prefix=2, mask=mask if padded else None,
                    size=randn(3, 6, seed=3).abs() + 0.5 if sized else None)  # fmt: skip
    index = torch.tensor([[3, 0], [1, 2], [0, 2]])
    kept = torch.tensor([[True, True], [True, False], [True, False]]) if chosen == "padded" else None
    seen: list[tuple[Tensor, Tensor]] = []

    def choose(state: Any) -> tuple[Tensor, Tensor | None]:
        seen.append((state.class_attention(), state.value_norms()))
        return index, kept

    trace: list[Tokens] = []
    expected = layer(tokens, choose if chosen else None)
    found = layer.eval()(replace(tokens, trace=trace), choose if chosen else None)
    assert trace == [found]
    real = torch.ones_like(found.x[..., 0], dtype=torch.bool) if found.mask is None else found.mask
    torch.testing.assert_close(found.x[real], expected.x[real], rtol=1e-5, atol=1e-6)
    assert found.x[~real].abs().sum() == 0
    for name in ("prefix", "frames", "grid", "size", "mask"):
        assert_equal(getattr(found, name), getattr(expected, name))
    if chosen:
        everywhere = mask if padded else torch.ones_like(mask)
        (attention, norms), (packed_attention, packed_norms) = seen
        torch.testing.assert_close(packed_attention, attention, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(packed_norms, norms * everywhere, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_inference_computes_nothing_on_padding() -> None:
    layer, rows = block(), list[tuple[int, ...]]()
    tokens = Tokens(randn(2, 5, 24), mask=torch.tensor([[True] * 5, [True, True, False, True, False]]))
    for part in (layer.norm1, layer.attn.qkv, layer.attn.proj, layer.mlp):
        part.register_forward_hook(lambda module, args, output: rows.append(tuple(args[0].shape)))
    layer.train()(tokens)
    layer.eval()(tokens)
    assert rows == [(2, 5, 24)] * 4 + [(1, 8, 24)] * 4


@torch.no_grad()
def test_the_feed_forward_half_alone_spends_nothing_on_padding() -> None:
    layer = block().train()
    tokens = Tokens(randn(2, 5, 24), mask=torch.tensor([[True] * 5, [True, True, False, True, False]]))
    everywhere, rows = layer.feed_forward(tokens).x, []
    layer.mlp.register_forward_hook(lambda module, args, output: rows.append(args[0].shape))
    found = layer.eval().feed_forward(tokens)
    assert rows == [(1, 8, 24)]
    torch.testing.assert_close(found.x[tokens.mask], everywhere[tokens.mask])
    assert found.x[~tokens.mask].abs().sum() == 0  # finite: attention multiplies it by 0


def test_gradients_flow_through_packed_tokens() -> None:
    layer, mask = block(), torch.tensor([[True] * 5, [True, True, False, True, False]])
    gradients = []
    for mode in (True, False):
        x = randn(2, 5, 24).requires_grad_()
        found = layer.train(mode)(Tokens(x, prefix=1, mask=mask), lambda state: (torch.tensor([[0, 2], [0, 2]]), None))
        gradients.append(torch.autograd.grad((found.x * found.mask[..., None]).square().sum(), x)[0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_a_token_of_size_three_acts_as_three_equal_tokens() -> None:
    """This holds for proportional attention (ToMe, section 3) and for the mean."""
    layer, x = block(), randn(2, 5, 24)
    size = torch.tensor([[1.0, 3.0, 1.0, 2.0, 1.0]]).expand(2, -1)
    copies = x.repeat_interleave(torch.tensor([1, 3, 1, 2, 1]), dim=1)
    merged, repeated = layer(Tokens(x, prefix=1, size=size)), layer(Tokens(copies, prefix=1))
    torch.testing.assert_close(merged.x, repeated.x[:, [0, 1, 4, 5, 7]], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged.mean(), repeated.mean(), rtol=1e-5, atol=1e-6)
