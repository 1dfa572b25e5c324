"""Random token dropping: the sampling, the record afterwards, and reproducibility."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch

from fewtokens.analysis.cost import macs
from fewtokens.backbones.vit import ViT, vit
from fewtokens.errors import FewtokensError
from fewtokens.layers.attention import Attention
from fewtokens.layers.block import Block
from fewtokens.tokenizers.base import LayerContext, Tokenizer, num_kept, top_positions
from fewtokens.tokenizers.random_drop import RandomDrop, random_scores
from fewtokens.tokens import Tokens

N = 15
CONTEXT = LayerContext(dim=16, heads=2, block=0, depth=1, prefix=2)


class Through(Block):
    """A block that does nothing, so that tests see the output of the tokenizer."""

    def __init__(self) -> None:
        super().__init__(8, 2, attn_layer=Attention)

    def forward(self, tokens: Tokens) -> Tokens:
        return tokens


def image(batch: int = 4) -> Tokens:
    origin = torch.eye(N).expand(batch, N, N)
    return Tokens(torch.randn(batch, 2 + N, 16), prefix=2, grid=(3, 5), origin=origin)


def model(keep: float, at: object = (1, 2)) -> ViT:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "num_classes": 5, "dim": 16, "depth": 3, "heads": 2}
    return vit(**sizes, tokenizer={"at": at, "build": partial(RandomDrop, keep_rate=keep)}).eval()


def dropped(tokens: Tokens, train: bool = False, keep: float = 0.5) -> Tokens:
    return RandomDrop(CONTEXT, keep).train(train)(tokens, Through())


@pytest.mark.parametrize(
    ("count", "keep", "stays"), [(30, 0.1, 3), (10, 0.7, 7), (15, 0.5, 8), (4, 0.01, 1), (4, 1.0, 4)]
)
def test_a_share_is_rounded_up_unless_it_is_an_integer(count: int, keep: float, stays: int) -> None:
    assert num_kept(count, keep) == stays


def test_of_equal_scores_the_first_positions_are_taken() -> None:
    scores = torch.tensor([[1.0, 2, 1, 2, 1, 1], [0, 0, 0, 0, 0, 0]])
    assert top_positions(scores, 0.5)[0].tolist() == [[0, 1, 3], [0, 1, 2]]


def test_every_image_keeps_its_share_of_its_valid_patches() -> None:
    scores = torch.tensor([[5.0, 4, 3, 2, 1, 0], [5, 4, 3, 2, 1, 0]])
    valid = torch.tensor([[True] * 6, [False, False, True, True, False, False]])
    index, mask = top_positions(scores, 0.5, valid)
    assert mask is not None
    assert index[0].tolist() == [0, 1, 2]
    assert mask.tolist() == [[True] * 3, [True, False, False]]
    assert index[1, 0] == 2


@torch.no_grad()
@pytest.mark.parametrize("train", [True, False])
def test_every_image_keeps_other_patches_and_they_are_unchanged(train: bool) -> None:
    tokens = image()
    few = dropped(tokens, train)
    assert (few.num_patches, few.prefix, few.grid, few.mask) == (8, 2, None, None)
    assert torch.equal(few.x[:, :2], tokens.x[:, :2])
    assert few.origin is not None
    assert ((few.origin == 0) | (few.origin == 1)).all()
    assert (few.origin.sum(dim=2) == 1).all()
    assert (few.origin.sum(dim=1) <= 1).all()
    assert torch.equal(few.origin @ tokens.patches, few.patches)
    places = few.origin.argmax(dim=2)
    assert (places.diff(dim=1) > 0).all()
    assert len({tuple(row) for row in places.tolist()}) == 4


@torch.no_grad()
def test_all_patches_are_kept_equally_often() -> None:
    few = dropped(image(2000), train=True, keep=0.4)
    assert few.origin is not None
    assert ((few.origin.sum(dim=1).mean(dim=0) - 0.4).abs() < 0.05).all()


@torch.no_grad()
def test_evaluation_is_reproducible_and_training_is_random() -> None:
    tokens = image()
    assert torch.equal(dropped(tokens).x, dropped(tokens).x)
    first = dropped(tokens, train=True).x
    assert not torch.equal(first, dropped(tokens, train=True).x)
    assert not torch.equal(random_scores(tokens.patches, 0), random_scores(tokens.patches, 1))
    # independent of the images after it in the batch
    assert torch.equal(random_scores(tokens.patches, 0)[:2], random_scores(tokens.patches[:2], 0))
    before = torch.get_rng_state()
    random_scores(tokens.patches, 0)
    assert torch.equal(torch.get_rng_state(), before), "evaluation does not use torch's generator"


def test_seeded_scores_are_uniform_and_neighbors_are_uncorrelated() -> None:
    x = torch.stack([random_scores(torch.empty(200, 196, 1), seed) for seed in range(3)])
    assert x.min() >= 0
    assert x.max() < 1
    counts = torch.histc(x, 20, 0, 1) / x.numel()
    assert ((counts - 0.05).abs() < 0.002).all()
    for a, b in ((x[0], x[1]), (x[:, 1:], x[:, :-1]), (x[..., 1:], x[..., :-1])):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.02
    assert len(x[0].unique()) > 0.99 * x[0].numel()


@torch.no_grad()
def test_padding_is_kept_last_and_stays_padding() -> None:
    mask = torch.ones(4, 2 + N, dtype=torch.bool)
    mask[1, 6:] = False  # 4 patches
    few = dropped(replace(image(), mask=mask))
    assert few.mask is not None
    assert few.mask.sum(dim=1).tolist() == [2 + 8, 2 + 2, 2 + 8, 2 + 8]


@torch.no_grad()
def test_keeping_all_is_the_plain_transformer() -> None:
    images = torch.randn(2, 3, 16, 16)
    with (complete := model(1.0)).encoder.without_reduction():
        expected = complete(images)
    assert torch.equal(complete(images), expected)
    tokens, block = image(), Block(16, 2, attn_layer=Attention)
    out = RandomDrop(CONTEXT, 1.0)(tokens, block)
    assert torch.equal(out.x, Tokenizer(CONTEXT)(tokens, block).x)
    assert out.grid == (3, 5)


def test_gradients_reach_the_kept_patches_alone() -> None:
    tokens = image()
    tokens.x.requires_grad_()
    few = dropped(tokens)
    few.patches.sum().backward()
    assert few.origin is not None
    assert torch.equal(tokens.x.grad[:, 2:, 0], few.origin.sum(dim=1))


def test_less_is_cheaper_and_autocast_is_finite() -> None:
    image_ = torch.randn(1, 3, 16, 16)
    costs = [macs(model(keep), image_) for keep in (0.25, 0.5, 0.75, 1.0)]
    assert costs == sorted(set(costs))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(0.5).train()(image_).square().sum()
    loss.backward()
    assert torch.isfinite(loss)


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.5])
def test_a_keep_rate_out_of_range_is_an_error(keep: float) -> None:
    message = rf"^`tokenizer\.build\.keep_rate` must be above 0 and at most 1, got {re.escape(str(keep))}\.$"
    with pytest.raises(FewtokensError, match=message):
        RandomDrop(CONTEXT, keep)
