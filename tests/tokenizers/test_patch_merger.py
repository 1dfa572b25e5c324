"""PatchMerger: the formula in plain numpy, frames, order, TokenFuser around it, and errors."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from fewtokens.analysis.cost import macs
from fewtokens.backbones.vit import ViT, vit
from fewtokens.errors import FewtokensError
from fewtokens.tokenizers.base import LayerContext
from fewtokens.tokenizers.patch_merger import PatchMerger
from fewtokens.tokenizers.token_fuser import TokenFuser
from fewtokens.tokens import Tokens

CONTEXT = LayerContext(dim=8, heads=2, block=0, depth=1, prefix=2, grid=(3, 5))


def clip(frames: int = 1) -> Tokens:
    count = 15 * frames
    return Tokens(torch.randn(2, 2 + count, 8), 2, frames, (3, 5), origin=torch.eye(count).expand(2, -1, -1))


def merger(**more: object) -> PatchMerger:
    tokenizer = PatchMerger(CONTEXT, 4, **more)
    for parameter in tokenizer.norm.parameters():
        torch.nn.init.normal_(parameter)
    return tokenizer


def model(num_tokens: int, build: object = None) -> ViT:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "num_classes": 5, "dim": 16, "depth": 2, "heads": 2}
    build = build or partial(PatchMerger, num_tokens=num_tokens)
    return vit(**sizes, tokenizer={"at": 1, "build": build}).eval()


@torch.no_grad()
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("frames", [1, 3])
def test_the_formula(scale: bool, frames: int) -> None:
    tokenizer, tokens = merger(scale=scale), clip(frames)
    few = tokenizer.pool(tokens)
    x = tokens.per_frame.double().numpy()
    gain, shift, queries = (t.double().numpy() for t in (*tokenizer.norm.parameters(), tokenizer.queries))
    z = (x - x.mean(axis=2, keepdims=True)) / np.sqrt(x.var(axis=2, keepdims=True) + 1e-5) * gain + shift
    weights = np.exp(np.einsum("sc,bnc->bsn", queries, z) * (8**-0.5 if scale else 1))
    weights /= weights.sum(axis=2, keepdims=True)
    np.testing.assert_allclose(few.per_frame, weights @ z, rtol=1e-4, atol=1e-5)
    assert torch.equal(few.x[:, :2], tokens.x[:, :2])
    assert (few.num_patches, few.frames, few.prefix, few.grid) == (4 * frames, frames, 2, None)
    assert few.origin is not None
    torch.testing.assert_close(few.origin.sum(dim=2), torch.ones(2, 4 * frames))
    np.testing.assert_allclose(few.origin[0, :4, :15], weights[0], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_the_order_of_the_patches_does_not_matter_and_equal_patches_weigh_the_same() -> None:
    tokenizer, tokens = merger(), clip()
    shuffled = tokens.select(torch.randperm(15).expand(2, 15))
    torch.testing.assert_close(tokenizer.pool(shuffled).x, tokenizer.pool(tokens).x)
    same = tokenizer.pool(tokens.update(torch.ones_like(tokens.x)))
    assert same.origin is not None
    torch.testing.assert_close(same.origin, torch.full((2, 4, 15), 1 / 15))


def test_gradients_under_autocast_and_cost() -> None:
    net, images = model(4).train(), torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(images).square().sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
    assert net.encoder.tokenizers[1].queries.grad.abs().min() > 0
    costs = [macs(model(count), images[:1]) for count in (1, 4, 8)]
    assert costs == sorted(set(costs))


@torch.no_grad()
def test_token_fuser_wraps_it() -> None:
    fused = model(4, partial(TokenFuser, inner=partial(PatchMerger, num_tokens=4)))
    assert torch.isfinite(fused(torch.randn(2, 3, 16, 16))).all()


def test_the_norm_is_computed_once_and_has_the_epsilon_of_torch() -> None:
    tokenizer, calls = merger(), []
    tokenizer.norm.register_forward_hook(lambda *_: calls.append(1))
    tokenizer.pool(clip())
    assert len(calls) == 1
    assert tokenizer.norm.eps == 1e-5


def test_errors() -> None:
    with pytest.raises(FewtokensError, match=r"^`tokenizer\.build\.num_tokens` must be an int >= 1, or .*, got 0\.$"):
        PatchMerger(CONTEXT, 0)
    with pytest.raises(
        FewtokensError, match=r"^PatchMerger makes the same number of tokens of every sample and takes no"
    ):
        merger().pool(replace(clip(), mask=torch.ones(2, 17, dtype=torch.bool)))
