"""Top-k: the selection in plain numpy, ties, padding, and errors."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fewtokens.errors import FewtokensError
from fewtokens.layers.attention import AttentionState
from fewtokens.layers.block import Block
from fewtokens.tokenizers.base import LayerContext
from fewtokens.tokenizers.top_k import TopK, class_attention
from fewtokens.tokens import Tokens

N, P, DIM = 15, 3, 16
CONTEXT = LayerContext(dim=DIM, heads=2, block=0, depth=1, prefix=P, class_token=True)


def attention_by_hand(block: Block, x: Tensor) -> np.ndarray:
    """Return the class token's attention to the patches, the mean over heads, in float64."""
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
    plain = block(tokens).x  # The MLP acts on each token alone, so the kept ones equal those of the plain block.
    rows = np.concatenate([np.tile(np.arange(P), (4, 1)), expected + P], axis=1)
    torch.testing.assert_close(out.x, plain.gather(1, torch.from_numpy(rows)[..., None].expand(-1, -1, DIM)))
    assert (out.prefix, out.grid, out.mask) == (P, None, None)


@torch.no_grad()
def test_attention_is_a_row_of_the_attention_matrix() -> None:
    query, key = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    matrix = (query @ key.transpose(2, 3) * 0.5).softmax(dim=3)
    found = class_attention(AttentionState(query, key, key, None, 0.5), 2)
    torch.testing.assert_close(found, matrix[:, :, 0, 2:].mean(dim=1))


@torch.no_grad()
def test_of_equally_attended_patches_the_first_stay(block: Block, make_images) -> None:
    torch.nn.init.zeros_(block.attn.qkv.weight)
    out = TopK(CONTEXT, 0.2)(make_images(), block)
    assert out.origin is not None
    assert out.origin.argmax(dim=2).tolist() == [[0, 1, 2]] * 4


@torch.no_grad()
def test_padding_is_never_selected_and_changes_nothing(block: Block, make_images, padding: Tensor) -> None:
    """An image gets the same tokens with padding as without."""
    tokens = make_images()
    out = TopK(CONTEXT, 0.5)(replace(tokens, mask=padding), block)
    assert out.mask is not None
    assert out.mask.sum(dim=1).tolist() == [P + 8, P + 5, P + 8, P + 8]
    alone = TopK(CONTEXT, 0.5)(Tokens(tokens.x[1:2, : P + 10], P), block)
    torch.testing.assert_close(out.x[1][out.mask[1]], alone.x[0])


def test_keeping_all_is_the_plain_transformer_and_less_is_cheaper(check_keep_rates) -> None:
    check_keep_rates(TopK, (0.25, 0.5, 0.75, 1.0))


def test_gradients_reach_all_parameters_under_autocast(check_autocast) -> None:
    check_autocast(TopK)


def test_errors() -> None:
    message = (
        r"^TopK scores patches by the attention of the class token, but the backbone has none\. Choose a backbone with"
    )
    with pytest.raises(FewtokensError, match=message):
        TopK(replace(CONTEXT, class_token=False))
    with pytest.raises(FewtokensError, match=r"^`tokenizer\.build\.keep_rate` must be above 0 and at most 1, got 0\.0"):
        TopK(CONTEXT, 0.0)
