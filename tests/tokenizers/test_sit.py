"""SiT: the official module, a second version in numpy and float64, sizes, padding, frames, and errors."""

from dataclasses import replace
from functools import partial
from math import erf, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch

from fewtokens.analysis.cost import macs, tokens_per_block
from fewtokens.errors import FewtokensError
from fewtokens.tokenizers.base import LayerContext, pooled_count
from fewtokens.tokenizers.sit import SiT
from fewtokens.tokenizers.token_fuser import TokenFuser
from fewtokens.tokens import Tokens

CONTEXT = LayerContext(dim=8, heads=2, block=0, depth=1, prefix=2, grid=(3, 5))
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
with np.load(Path(__file__).parents[1] / "golden" / "token_reduction.npz") as file:
    GOLDEN = {key: torch.from_numpy(file[key]) for key in file.files if key.startswith("t")}


def clip(frames: int = 1, **more: object) -> Tokens:
    count = 15 * frames
    return Tokens(torch.randn(2, 2 + count, 8), 2, frames, (3, 5), origin=torch.eye(count).expand(2, -1, -1), **more)


def random(num_tokens: int | float = 4) -> SiT:
    tokenizer = SiT(CONTEXT, num_tokens)
    for parameter in tokenizer.parameters():
        torch.nn.init.normal_(parameter)
    return tokenizer


@torch.no_grad()
@pytest.mark.parametrize("case", sorted({key.split(".")[0] for key in GOLDEN}))
def test_weights_and_tokens_are_the_official_ones(case: str) -> None:
    g = {key.removeprefix(f"{case}."): value for key, value in GOLDEN.items() if key.startswith(f"{case}.")}
    names = {"param.weight": "mlp", "param.scale": "scale"}
    state = {key.replace(old, new): g[key].squeeze() for old, new in names.items() for key in g if key.startswith(old)}
    tokenizer = SiT(replace(CONTEXT, dim=g["x"].shape[2]), g["tokens"].shape[1])
    tokenizer.load_state_dict(state | {"scale": state["scale"].reshape(1)})
    close(tokenizer.maps(Tokens(g["x"])), g["weights"])
    close(tokenizer.pool(Tokens(g["x"])).x, g["tokens"])


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("sized", [False, True])
def test_the_formula(frames: int, sized: bool) -> None:
    size = torch.randint(1, 5, (2, 2 + 15 * frames)).float()
    tokenizer, tokens = random(), clip(frames, size=size if sized else None)
    few = tokenizer.pool(tokens)
    p = {name: value.double().numpy() for name, value in tokenizer.state_dict().items()}
    x = tokens.per_frame.double().numpy()
    z = (x - x.mean(axis=2, keepdims=True)) / np.sqrt(x.var(axis=2, keepdims=True) + 1e-5)
    z = (z * p["mlp.0.weight"] + p["mlp.0.bias"]) @ p["mlp.1.weight"].T + p["mlp.1.bias"]
    z = z * 0.5 * (1 + np.vectorize(erf)(z / sqrt(2)))
    logits = (z @ p["mlp.3.weight"].T + p["mlp.3.bias"]) * p["scale"]
    counts = size[:, 2:].reshape(2 * frames, 15, 1).numpy() if sized else 1
    weights = np.exp(logits) * counts
    weights = (weights / weights.sum(axis=1, keepdims=True)).transpose(0, 2, 1)
    np.testing.assert_allclose(few.per_frame, weights @ x, rtol=1e-4, atol=1e-5)
    assert torch.equal(few.x[:, :2], tokens.x[:, :2])
    assert (few.num_patches, few.frames, few.prefix, few.grid) == (4 * frames, frames, 2, None)
    assert few.origin is not None
    close(few.origin.sum(dim=2), torch.ones(2, 4 * frames))
    np.testing.assert_allclose(few.origin[0, :4, :15], weights[0], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_patch_of_size_three_counts_three_times_and_padding_does_not_count() -> None:
    tokenizer, x = random(), torch.randn(1, 7, 8)
    mask = torch.tensor([[True, True, True, False, True, True, False]])
    size = torch.tensor([[1.0, 1, 3, 9, 1, 1, 9]])
    few = tokenizer.pool(Tokens(x, 2, mask=mask, size=size, origin=torch.eye(5)[None]))
    close(few.x, tokenizer.pool(Tokens(x[:, [0, 1, 2, 2, 2, 4, 5]], 2)).x)
    assert few.mask is None
    assert few.size.tolist() == [[1.0] * 6]
    assert (few.origin[..., [1, 4]] == 0).all()


@torch.no_grad()
def test_the_order_of_the_patches_does_not_matter_and_equal_patches_weigh_the_same() -> None:
    tokenizer, tokens = random(), clip()
    close(tokenizer.pool(tokens.select(torch.randperm(15).expand(2, 15))).x, tokenizer.pool(tokens).x)
    same = tokenizer.pool(tokens.update(torch.ones_like(tokens.x)))
    close(same.origin, torch.full((2, 4, 15), 1 / 15))


def test_it_is_almost_the_mean_at_initialization_as_in_the_official_code() -> None:
    tokenizer = SiT(LayerContext(dim=384, heads=6, block=0, depth=1, grid=(14, 14)))
    assert tokenizer.num_tokens == 98
    for layer in (tokenizer.mlp[1], tokenizer.mlp[3]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert (layer.bias == 0).all()
    assert tokenizer.mlp[1].out_features == 192
    assert tokenizer.scale.item() == 1
    tokens = Tokens(torch.randn(2, 196, 384))
    close(tokenizer.pool(tokens).x.mean(dim=1), tokens.mean(), rtol=0, atol=0.02)


@pytest.mark.parametrize(("stage", "left"), [(0, 98), (1, 49), (2, 25)])
def test_a_share_refers_to_what_the_previous_stage_left(stage: int, left: int) -> None:
    context = replace(CONTEXT, grid=(14, 14), stage=stage, stages=3)
    assert pooled_count(0.5, context)[1] == left
    assert pooled_count(1.0, context) == (196, 196)
    assert pooled_count(8, context) == (8 if stage else 196, 8)
    assert pooled_count(0.5, replace(context, full_grid=True)) == (196, 98)
    assert SiT(context, 0.5).num_tokens == left


def test_gradients_under_autocast_and_cost(make_model) -> None:
    net, images = make_model(SiT).train(), torch.randn(2, 3, 16, 16)
    assert tokens_per_block(net, images) == [3 + 16, 3 + 8, 3 + 4]
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(images).square().sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
    assert net.encoder.tokenizers[1].scale.grad.abs() > 0
    assert torch.isfinite(net.bfloat16()(images.bfloat16())).all()
    costs = [macs(make_model(partial(SiT, num_tokens=count)), images[:1]) for count in (1, 4, 8)]
    assert costs == sorted(set(costs))


@torch.no_grad()
def test_token_fuser_wraps_it(make_model) -> None:
    assert torch.isfinite(make_model(partial(TokenFuser, inner=SiT))(torch.randn(2, 3, 16, 16))).all()


@pytest.mark.parametrize(("num_tokens", "got"), [(0, "0"), (0.0, r"0\.0"), (1.1, r"1\.1"), ([0.5, 0], None)])
def test_errors(num_tokens: int | float | list, got: str | None) -> None:
    message = rf"^`tokenizer\.build\.num_tokens` must be an int >= 1, or a float above 0 and at most 1, got {got}\.$"
    if got is None:
        message = r"^`tokenizer\.build\.num_tokens` must be one value, or a list with one for each of the 1 blocks"
    with pytest.raises(FewtokensError, match=message):
        SiT(CONTEXT, num_tokens)
