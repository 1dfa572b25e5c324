"""The blocks that get a tokenizer, and the encoder that runs them."""

import re
from collections.abc import Sequence
from functools import partial

import jaxtyping
import pytest
import torch

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
    """Disable pytest's type checks, which would reject wrong settings before our own checks do."""
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
        ((9, 3), 12, [3, 9]),  # sorted
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
NOT_A_BLOCK = ["2", "0.5", "", ":", "x:", "4:", "-1:", "1.5:", "1:2"]
NOT_A_NUMBER = [True, [True], [0, "1"], ["0.5:"], [[1]], [None], None]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("at", "got"),
    [(at, at) for at in (*OUTSIDE, *NOT_A_BLOCK, *NOT_A_NUMBER) if not isinstance(at, list)]
    + [(at, at[-1]) for at in (*OUTSIDE, *NOT_A_NUMBER) if isinstance(at, list)],
    ids=repr,
)
def test_invalid_blocks_are_an_error(at: At, got: object) -> None:
    said = (
        r"^`tokenizer\.at` must be a block index from 0 to 3, a relative depth d with 0 <= d < 1, 'd:' for all blocks "
        rf"from there on, or a list of blocks such as \[3,6,9\], got {re.escape(repr(got))}\.$"
    )
    with pytest.raises(FewtokensError, match=said):
        block_indices(at, 4)


@pytest.mark.parametrize(
    ("at", "indices"), [([3, 3], r"\[3, 3\]"), ([0.5, 6], r"\[6, 6\]"), ([0.5, 0.51], r"\[6, 6\]")]
)
def test_a_block_given_twice_is_an_error(at: Sequence[float], indices: str) -> None:
    given = re.escape(str(at))
    said = rf"^`tokenizer\.at` must name different blocks, got {given}, which are blocks {indices} of 12\.$"
    with pytest.raises(FewtokensError, match=said):
        block_indices(at, 12)


def test_every_tokenizer_gets_the_context_of_its_layer() -> None:
    seen: list[LayerContext] = []

    def build(context: LayerContext) -> Tokenizer:
        seen.append(context)
        return Tokenizer(context)

    encoder(build, [3, 1])
    assert [(p.block, p.stage, p.stages, p.depth) for p in seen] == [(1, 0, 2, 4), (3, 1, 2, 4)]
    assert all((p.dim, p.heads, p.prefix, p.class_token, p.frames, p.grid) == (16, 2, 1, True, 2, (3, 4)) for p in seen)


def test_the_context_holds_the_number_of_blocks() -> None:
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
def test_several_token_learners_in_one_encoder() -> None:
    build = lambda context: TokenLearnerV11(context, num_tokens=6 - 2 * context.stage)  # noqa: E731
    assert encoder(build, [1, 3])(clip()).num_patches == 2 * 4


INNER = partial(TokenLearner, num_tokens=3)


@pytest.mark.parametrize(
    "build",
    [INNER, TokenLearnerV11, TokenLearnerV11Grouped, partial(TokenFuser, inner=INNER)],
    ids=["1.0", "1.1", "1.1 grouped", "fuser"],
)
def test_no_two_layers_share_parameters(build: object) -> None:
    model = encoder(build, "1:")
    pointers = [p.data_ptr() for _, p in model.named_parameters(remove_duplicate=False)]
    assert len(set(pointers)) == len(pointers)
    one, other = (dict(model.tokenizers[i].named_parameters()) for i in (1, 2))
    assert one.keys() == other.keys()
    assert any(not torch.equal(one[name], other[name]) for name in one)  # each is initialized with other random values


@torch.no_grad()
def test_without_reduction_runs_the_same_weights_as_the_plain_transformer() -> None:
    model, tokens = encoder(partial(TokenLearnerV11, num_tokens=3), "1:"), clip()
    plain = Encoder(list(model.blocks), Tokenizer, [], CONTEXT)
    reduced, reducing = model(tokens), model.tokenizers
    with model.without_reduction():
        assert torch.equal(model(tokens).x, plain(tokens).x)
    assert model.tokenizers == reducing
    assert torch.equal(model(tokens).x, reduced.x)


def test_without_reduction_ends_with_an_exception() -> None:
    model = encoder(partial(TokenLearnerV11, num_tokens=3), 1)
    names, tokenizers = set(model.state_dict()), model.tokenizers
    with pytest.raises(ZeroDivisionError), model.without_reduction():
        raise ZeroDivisionError
    assert set(model.state_dict()) == names
    assert all(one is other for one, other in zip(model.tokenizers, tokenizers, strict=True))
