"""Top-k: the choice against plain numpy, what the record says afterwards, and what it refuses."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from fewtokens.analysis.cost import macs
from fewtokens.errors import FewtokensError
from fewtokens.layers.attention import AttentionState
from fewtokens.layers.block import Block
from fewtokens.tokenizers.base import LayerContext
from fewtokens.tokenizers.top_k import TopK, class_attention
from fewtokens.tokens import Tokens

N, P, DIM = 15, 3, 16
CONTEXT = LayerContext(dim=DIM, heads=2, block=0, depth=1, prefix=P, class_token=True)


def attention_by_hand(block: Block, x: Tensor) -> np.ndarray:
    """The class token's row, patches alone, mean over the heads, in float64."""
    x = block.norm1(x).double().numpy()
    weight, bias = block.attn.qkv.weight.double().numpy(), block.attn.qkv.bias.double().numpy()
    query, key, _ = np.split(x @ weight.T + bias, 3, axis=2)
    rows = []
    for head in np.split(np.arange(DIM), 2):
        logits = np.einsum("bc,bnc->bn", query[:, 0, head], key[:, :, head]) / np.sqrt(DIM / 2)
        rows.append(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))
    return np.mean(rows, axis=0)[:, P:]


@torch.no_grad()
@pytest.mark.parametrize("keep", [0.05, 0.3, 0.7])
def test_the_most_attended_patches_stay_as_attention_left_them(keep: float, block: Block, make_images) -> None:
    tokens = make_images()
    scores = attention_by_hand(block, tokens.x)
    count = int(np.ceil(keep * N))
    expected = np.sort(np.argsort(-scores, axis=1)[:, :count], axis=1)
    out = TopK(CONTEXT, keep)(tokens, block)
    assert out.origin is not None
    assert out.origin.argmax(dim=2).tolist() == expected.tolist()
    assert (out.origin.sum(dim=2) == 1).all()
    assert ((out.origin == 0) | (out.origin == 1)).all()
    whole = block(tokens).x  # the MLP sees one token at a time, so what stays equals the plain block's
    rows = np.concatenate([np.tile(np.arange(P), (4, 1)), expected + P], axis=1)
    torch.testing.assert_close(out.x, whole.gather(1, torch.from_numpy(rows)[..., None].expand(-1, -1, DIM)))
    assert (out.prefix, out.grid, out.mask) == (P, None, None)


@torch.no_grad()
def test_attention_is_that_of_the_whole_matrix() -> None:
    query, key = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    whole = (query @ key.transpose(2, 3) * 0.5).softmax(dim=3)
    found = class_attention(AttentionState(query, key, key, None, 0.5), 2)
    torch.testing.assert_close(found, whole[:, :, 0, 2:].mean(dim=1))


@torch.no_grad()
def test_of_equally_attended_patches_the_first_stay(block: Block, make_images) -> None:
    torch.nn.init.zeros_(block.attn.qkv.weight)
    out = TopK(CONTEXT, 0.2)(make_images(), block)
    assert out.origin is not None
    assert out.origin.argmax(dim=2).tolist() == [[0, 1, 2]] * 4


@torch.no_grad()
def test_padding_is_never_chosen_and_changes_nothing(block: Block, make_images) -> None:
    """An image gets the same tokens with padding in it as without."""
    tokens = make_images()
    mask = torch.ones(4, P + N, dtype=torch.bool)
    mask[1, P + 10 :] = False
    out = TopK(CONTEXT, 0.5)(replace(tokens, mask=mask), block)
    assert out.mask is not None
    assert out.mask.sum(dim=1).tolist() == [P + 8, P + 5, P + 8, P + 8]
    alone = TopK(CONTEXT, 0.5)(Tokens(tokens.x[1:2, : P + 10], P), block)
    torch.testing.assert_close(out.x[1][out.mask[1]], alone.x[0])


@torch.no_grad()
def test_keeping_all_is_the_plain_transformer_and_less_is_cheaper(make_model) -> None:
    images = torch.randn(2, 3, 16, 16)
    with (whole := make_model(partial(TopK, keep_rate=1.0))).encoder.without_reduction():
        expected = whole(images)
    assert torch.equal(whole(images), expected)
    assert not torch.equal(make_model(partial(TopK, keep_rate=0.3))(images), expected)
    costs = [macs(make_model(partial(TopK, keep_rate=keep)), images[:1]) for keep in (0.25, 0.5, 0.75, 1.0)]
    assert costs == sorted(set(costs))


def test_gradients_reach_all_parameters_under_autocast(make_model) -> None:
    net = make_model(partial(TopK, keep_rate=0.5)).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(torch.randn(2, 3, 16, 16)).square().sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


def test_without_a_class_token_it_is_refused_at_build() -> None:
    said = (
        r"TopK keeps what the class token attends to\. Expected: .* class token\. Found: one that has none\. To do: .*"
    )
    with pytest.raises(FewtokensError, match=said):
        TopK(replace(CONTEXT, class_token=False))
    with pytest.raises(FewtokensError, match=r"TopK keeps a share of the patches"):
        TopK(CONTEXT, 0.0)
