"""EViT: the fused token in plain numpy, several stages, padding, sizes, and errors."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fewtokens.errors import FewtokensError
from fewtokens.layers.block import Block
from fewtokens.tokenizers.base import LayerContext
from fewtokens.tokenizers.evit import EViT, fusion_weights
from fewtokens.tokenizers.top_k import TopK, class_attention
from fewtokens.tokens import Tokens

N, P, DIM = 15, 3, 16
CONTEXT = LayerContext(dim=DIM, heads=2, block=0, depth=1, prefix=P, class_token=True)


@torch.no_grad()
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("ties", [True, False])
def test_kept_and_fused_tokens(normalize: bool, ties: bool, make_images) -> None:
    tokens = make_images()
    attention = torch.rand(4, N).mul(4).floor().add(1).div(100) if ties else torch.rand(4, N)
    out = EViT(CONTEXT, 0.4, normalize=normalize).reorganize(tokens, attention)
    assert out.origin is not None
    assert (out.x.shape, out.prefix, out.grid) == ((4, P + 7, DIM), P, None)
    assert torch.equal(out.x[:, :P], tokens.x[:, :P])
    for i, (a, x) in enumerate(zip(attention.double().numpy(), tokens.patches.double().numpy(), strict=True)):
        kept = sorted(sorted(range(N), key=lambda j: (-a[j], j))[:6])
        gone = [j for j in range(N) if j not in kept]
        weights = a[gone] / (a[gone].sum() if normalize else 1)
        fused = (weights[:, None] * x[gone]).sum(axis=0)
        np.testing.assert_allclose(out.patches[i], np.concatenate([x[kept], fused[None]]), rtol=1e-5, atol=1e-5)
        assert out.origin[i, :6].argmax(dim=1).tolist() == kept
        np.testing.assert_allclose(out.origin[i, 6, gone], weights, rtol=1e-5)
        assert (out.origin[i, 6, kept] == 0).all()


@torch.no_grad()
def test_it_acts_between_attention_and_mlp(block: Block, make_images) -> None:
    tokens, evit = make_images(), EViT(CONTEXT, 0.4)
    attended, state = block.attend(tokens)
    expected = block.feed_forward(evit.reorganize(attended, class_attention(state, P)))
    assert torch.equal(evit(tokens, block).x, expected.x)


@torch.no_grad()
def test_the_fused_token_is_a_patch_like_any_other_to_the_next_stage(make_images) -> None:
    once = EViT(CONTEXT, 0.4, normalize=True).reorganize(make_images(), torch.rand(4, N))
    attention = torch.zeros(4, 7)
    attention[:, 6] = 1
    twice = EViT(CONTEXT, 0.1, normalize=True).reorganize(once, attention)
    torch.testing.assert_close(twice.patches[:, 0], once.patches[:, 6])
    torch.testing.assert_close(twice.patches[:, 1], once.patches[:, :6].mean(dim=1))  # without any attention
    assert twice.origin is not None
    torch.testing.assert_close(twice.origin.sum(dim=2), torch.ones(4, 2))


@torch.no_grad()
def test_without_fusion_it_is_top_k(block: Block, make_images) -> None:
    tokens = make_images()
    assert torch.equal(EViT(CONTEXT, 0.4, fuse=False)(tokens, block).x, TopK(CONTEXT, 0.4)(tokens, block).x)


@torch.no_grad()
def test_sizes_go_along_and_the_fused_token_counts_once(make_images) -> None:
    size = torch.rand(4, P + N) + 1
    out = EViT(CONTEXT, 0.4).reorganize(make_images(size=size), torch.rand(4, N))
    assert out.size is not None
    assert out.origin is not None
    torch.testing.assert_close(out.size[:, P:-1], (out.origin[:, :-1] @ size[:, P:, None])[..., 0])
    assert (out.size[:, -1] == 1).all()


@torch.no_grad()
def test_padding_is_neither_kept_nor_fused(make_images, padding: Tensor) -> None:
    """An image gets the same tokens with padding as without. One with a single patch has nothing to fuse."""
    tokens, attention = make_images(), torch.rand(4, N)
    padding[2, P + 1 :] = False
    out = EViT(CONTEXT, 0.5).reorganize(replace(tokens, mask=padding), attention)
    assert out.mask is not None
    assert out.mask.sum(dim=1).tolist() == [P + 9, P + 6, P + 1, P + 9]
    assert torch.isfinite(out.x).all()
    alone = EViT(CONTEXT, 0.5).reorganize(Tokens(tokens.x[1:2, : P + 10], P), attention[1:2, :10])
    torch.testing.assert_close(out.x[1][out.mask[1]], alone.x[0])


def test_keeping_all_is_the_plain_transformer_and_less_is_cheaper(check_keep_rates) -> None:
    check_keep_rates(EViT)


def test_gradients_reach_every_patch_and_the_attention(make_images) -> None:
    tokens, attention = make_images(), torch.rand(4, N, requires_grad=True)
    tokens.x.requires_grad_()
    out = EViT(CONTEXT, 0.4).reorganize(tokens, attention)
    out.patches.square().sum().backward()
    assert (tokens.x.grad[:, P:].abs().sum(dim=2) > 0).all()
    assert out.origin is not None
    assert torch.equal(attention.grad != 0, out.origin[:, -1] > 0)


def test_it_is_finite_under_autocast(check_autocast) -> None:
    check_autocast(EViT)


def test_weights_are_finite_if_nothing_is_attended_to_or_dropped() -> None:
    found = fusion_weights(torch.zeros(2, 3), torch.tensor([[True, True, False], [False] * 3]), True)
    assert found.tolist() == [[0.5, 0.5, 0], [0, 0, 0]]


def test_a_backbone_without_class_token_is_an_error() -> None:
    with pytest.raises(FewtokensError, match=r"^EViT scores patches by the attention of the class token"):
        EViT(replace(CONTEXT, class_token=False))
