"""Where tokenizers stand, and the encoder that runs them."""

from collections.abc import Sequence
from functools import partial

import jaxtyping
import pytest
import torch
from torch import nn

from fewtokens.backbones.encoder import At, Encoder, block_indices
from fewtokens.errors import FewtokensError
from fewtokens.layers.attention import Attention
from fewtokens.layers.block import Block
from fewtokens.tokenizers.base import LayerContext, Tokenizer
from fewtokens.tokenizers.token_fuser import TokenFuser
from fewtokens.tokenizers.token_learner import TokenLearner, TokenLearnerV11, TokenLearnerV11Grouped
from fewtokens.tokens import Tokens

CONTEXT = LayerContext(dim=16, heads=2, block=0, depth=4, prefix=1, class_token=True, frames=2, grid=(3, 4))


def encoder(build: object, at: At, depth: int = 4) -> Encoder:
    torch.manual_seed(0)
    blocks = [Block(16, 2, attn_layer=Attention) for _ in range(depth)]
    return Encoder(blocks, build, at, CONTEXT).eval()


def clip() -> Tokens:
    x = torch.randn(2, 1 + 2 * 12, 16, generator=torch.Generator().manual_seed(0))
    return Tokens(x, prefix=1, frames=2, grid=(3, 4))


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong settings reach our own checks; where pytest's hook checks types, it would be the first to refuse them."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize(
    ("at", "depth", "indices"),
    [
        (0, 12, [0]),
        (11, 12, [11]),
        (0.0, 12, [0]),
        (0.5, 12, [6]),
        (0.5, 5, [2]),  # rounded down
        (0.99, 12, [11]),
        (0.29, 100, [29]),  # 28.999999999999996 in binary
        (0.7, 10, [7]),
        ([3, 6, 9], 12, [3, 6, 9]),
        ((9, 3), 12, [3, 9]),  # rising
        ([0.25, 0.5, 0.75], 12, [3, 6, 9]),
        ([1, 0.5], 12, [1, 6]),
        ([], 12, []),
        ("0:", 3, [0, 1, 2]),
        ("2:", 4, [2, 3]),
        ("0.5:", 4, [2, 3]),
        ("0.75:", 12, [9, 10, 11]),
    ],
)
def test_block_indices(at: At, depth: int, indices: list[int]) -> None:
    assert block_indices(at, depth) == indices


OUTSIDE = [4, -1, 1.0, -0.5, float("nan"), float("inf"), [0, 4]]
NOT_A_PLACE = ["2", "0.5", "", ":", "x:", "4:", "-1:", "1.5:", "1:2"]
NOT_A_NUMBER = [True, [True], [0, "1"], ["0.5:"], [[1]], [None], None]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("at", [*OUTSIDE, *NOT_A_PLACE, *NOT_A_NUMBER], ids=repr)
def test_places_outside_the_blocks_are_refused(at: At) -> None:
    said = (
        r"^A tokenizer stands before a block of the backbone\. Expected: a block index 0\.\.3, a relative depth "
        r"0 <= d < 1, or 'd:' for all blocks from there on\. Found: tokenizer\.at=.* for 4 blocks\. "
        r"To do: set tokenizer\.at=0\.5"
    )
    with pytest.raises(FewtokensError, match=said):
        block_indices(at, 4)


@pytest.mark.parametrize(
    ("at", "indices"), [([3, 3], r"\[3, 3\]"), ([0.5, 6], r"\[6, 6\]"), ([0.5, 0.51], r"\[6, 6\]")]
)
def test_a_block_named_twice_is_refused(at: Sequence[float], indices: str) -> None:
    said = (
        r"^One tokenizer stands before a block\. Expected: different blocks\. "
        rf"Found: tokenizer\.at=\[.*\], which is blocks {indices} of 12\. To do: name each block once"
    )
    with pytest.raises(FewtokensError, match=said):
        block_indices(at, 12)


def test_every_tokenizer_is_told_its_place() -> None:
    seen: list[LayerContext] = []

    def build(context: LayerContext) -> Tokenizer:
        seen.append(context)
        return Tokenizer(context)

    encoder(build, [3, 1])
    assert [(p.block, p.stage, p.stages, p.depth) for p in seen] == [(1, 0, 2, 4), (3, 1, 2, 4)]
    assert all((p.dim, p.heads, p.prefix, p.class_token, p.frames, p.grid) == (16, 2, 1, True, 2, (3, 4)) for p in seen)


def test_the_place_counts_the_blocks_that_are_there() -> None:
    assert {tokenizer.context.depth for tokenizer in encoder(Tokenizer, 0, depth=3).tokenizers} == {3}


@torch.no_grad()
def test_tokenizers_carry_the_tokens_through_the_blocks_in_order() -> None:
    model, tokens = encoder(partial(TokenLearnerV11, num_tokens=3), 2), clip()
    assert [type(t) for t in model.tokenizers] == [Tokenizer, Tokenizer, TokenLearnerV11, Tokenizer]
    expected = model.blocks[1](model.blocks[0](tokens))
    expected = model.blocks[3](model.blocks[2](model.tokenizers[2].pool(expected)))
    out = model(tokens)
    assert torch.equal(out.x, expected.x)
    assert out.x.shape == (2, 1 + 2 * 3, 16)


@torch.no_grad()
def test_token_learners_can_stand_in_a_row() -> None:
    build = lambda context: TokenLearnerV11(context, num_tokens=6 - 2 * context.stage)  # noqa: E731
    assert encoder(build, [1, 3])(clip()).num_patches == 2 * 4


INNER = partial(TokenLearner, num_tokens=3)


@pytest.mark.parametrize(
    "build",
    [INNER, TokenLearnerV11, TokenLearnerV11Grouped, partial(TokenFuser, inner=INNER)],
    ids=["1.0", "1.1", "1.1 grouped", "fuser"],
)
def test_no_two_places_share_parameters(build: object) -> None:
    model = encoder(build, "1:")
    pointers = [p.data_ptr() for _, p in model.named_parameters(remove_duplicate=False)]
    assert len(set(pointers)) == len(pointers)
    one, other = (dict(model.tokenizers[i].named_parameters()) for i in (1, 2))
    assert one.keys() == other.keys()
    assert any(not torch.equal(one[name], other[name]) for name in one)  # and each drew its own start


@torch.no_grad()
def test_dense_runs_the_same_weights_as_the_plain_transformer() -> None:
    model, tokens = encoder(partial(TokenLearnerV11, num_tokens=3), "1:"), clip()
    plain = Encoder(list(model.blocks), Tokenizer, [], CONTEXT)
    reduced, reducing = model(tokens), model.tokenizers
    with model.without_reduction():
        assert torch.equal(model(tokens).x, plain(tokens).x)
    assert model.tokenizers == reducing
    assert torch.equal(model(tokens).x, reduced.x)


def test_dense_ends_when_an_error_leaves_it() -> None:
    model = encoder(partial(TokenLearnerV11, num_tokens=3), 1)
    names = set(model.state_dict())
    with pytest.raises(ZeroDivisionError), model.without_reduction():
        raise ZeroDivisionError
    assert set(model.state_dict()) == names
    assert isinstance(model.tokenizers, nn.ModuleList)
