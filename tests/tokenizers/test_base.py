"""What all methods share: one value for each stage, warnings about too many tokens, dtypes, and `Tokens.size_bias`."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fewtokens.analysis.cost import tokens_per_block
from fewtokens.errors import FewtokensError
from fewtokens.tokenizers import base
from fewtokens.tokenizers.base import LayerContext, Tokenizer
from fewtokens.tokenizers.dpc_knn import DPCKNN
from fewtokens.tokenizers.dynamic_vit import DynamicViT
from fewtokens.tokenizers.evit import EViT
from fewtokens.tokenizers.fixed_pattern import FixedPattern
from fewtokens.tokenizers.k_medoids import KMedoids
from fewtokens.tokenizers.patch_merger import PatchMerger
from fewtokens.tokenizers.random_drop import RandomDrop
from fewtokens.tokenizers.sinkhorn import Sinkhorn
from fewtokens.tokenizers.sit import SiT
from fewtokens.tokenizers.token_fuser import TokenFuser
from fewtokens.tokenizers.token_learner import TokenLearner, TokenLearnerV11, TokenLearnerV11Grouped
from fewtokens.tokenizers.top_k import TopK

SELECTORS = [TopK, EViT, RandomDrop, DPCKNN, KMedoids, DynamicViT, FixedPattern]
POOLERS = [Sinkhorn, SiT, PatchMerger, TokenLearnerV11, partial(TokenLearnerV11Grouped, groups=4)]
CONTEXT = LayerContext(dim=16, heads=2, block=1, depth=3, prefix=3, class_token=True, grid=(4, 4), stages=2)
IMAGES = torch.randn(1, 3, 16, 16)
Build = Callable[[LayerContext], Tokenizer]


# --- one value for each stage


@torch.no_grad()
@pytest.mark.parametrize("method", SELECTORS)
def test_keep_rate_takes_one_value_for_each_stage(method: type[Tokenizer], make_model) -> None:
    """The second stage counts from what the first one left; EViT adds a fused token at each stage."""
    found = tokens_per_block(make_model(partial(method, keep_rate=[0.75, 0.5])), IMAGES)
    expected = {EViT: [19, 3 + 12 + 1, 3 + 7 + 1]}.get(method, [19, 3 + 12, 3 + (4 if method is FixedPattern else 6)])
    assert found == expected
    same = tokens_per_block(make_model(partial(method, keep_rate=[0.75, 0.75])), IMAGES)
    assert same == tokens_per_block(make_model(partial(method, keep_rate=0.75)), IMAGES)


@torch.no_grad()
@pytest.mark.parametrize("method", POOLERS)
def test_num_tokens_takes_one_value_for_each_stage(method: Build, make_model) -> None:
    assert tokens_per_block(make_model(partial(method, num_tokens=[8, 0.25])), IMAGES) == [19, 3 + 8, 3 + 2]
    assert tokens_per_block(make_model(partial(method, num_tokens=[0.5, 5])), IMAGES) == [19, 3 + 8, 3 + 5]


@torch.no_grad()
def test_inside_of_token_fuser_every_stage_has_its_own_value_and_all_patches(make_model) -> None:
    for inner in (SiT, TokenLearner):
        model = make_model(partial(TokenFuser, inner=partial(inner, num_tokens=[0.5, 0.25])))
        assert [tokenizer.inner.num_tokens for tokenizer in model.encoder.tokenizers[1:]] == [8, 4]
        assert torch.isfinite(model(IMAGES)).all()


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5, 0.5], []])
@pytest.mark.parametrize(
    ("method", "name"),
    [*[(method, "keep_rate") for method in SELECTORS], *[(method, "num_tokens") for method in POOLERS]],
)
def test_a_list_of_another_length_is_an_error(method: Build, name: str, values: list[float]) -> None:
    message = (
        rf"^`tokenizer\.build\.{name}` must be one value, or a list with one for each of the 2 blocks in "
        rf"`tokenizer\.at`, got a list of {len(values)}\.$"
    )
    with pytest.raises(FewtokensError, match=message):
        partial(method, **{name: values})(CONTEXT)


@pytest.mark.parametrize("method", SELECTORS)
def test_every_value_of_a_list_is_checked(method: Build) -> None:
    message = r"^`tokenizer\.build\.keep_rate` must be above 0 and at most 1, got \[0\.5, 1\.5\]\.$"
    with pytest.raises(FewtokensError, match=message):
        method(CONTEXT, keep_rate=[0.5, 1.5])


# --- more tokens than patches


@pytest.mark.parametrize("method", [*POOLERS, TokenLearner])
def test_more_tokens_than_patches_are_logged_once(method: Build, caplog: pytest.LogCaptureFixture) -> None:
    base._warn_of_more_tokens.cache_clear()
    with caplog.at_level(logging.WARNING):
        for block in (0, 1):
            tokenizer = partial(method, num_tokens=100)(replace(CONTEXT, block=block))
            partial(method, num_tokens=16)(CONTEXT)
    assert tokenizer.num_tokens == 100
    (message,) = caplog.messages
    assert "makes 100 tokens per frame out of 16, so it reduces nothing" in message


# --- dtypes


class NoFloat64(TorchDispatchMode):
    """A mode in which float64 is an error, as on MPS."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        assert all(getattr(leaf, "dtype", None) != torch.float64 for leaf in tree_leaves(result)), func
        return result


@torch.no_grad()
@pytest.mark.parametrize("method", SELECTORS)
def test_nothing_is_computed_in_float64(method: type[Tokenizer], block, make_images, padding) -> None:
    context = replace(CONTEXT, grid=(3, 5), stages=1)
    padded = None if method in (DynamicViT, FixedPattern) else padding
    tokenizer, tokens = method(context, keep_rate=0.7).eval(), make_images(mask=padded)
    with NoFloat64():
        tokenizer(tokens, block)


# --- size_bias of Tokens


@torch.no_grad()
def test_size_bias_is_carried_on_and_turns_off_the_bias_of_sizes_only(make_images, padding) -> None:
    size = torch.rand(4, 18) + 1
    tokens = make_images(size=size, size_bias=False)
    leaves, spec = tree_flatten(tokens)
    for record in (tokens.update(tokens.x), tree_unflatten(leaves, spec), tokens.select(torch.zeros(4, 2, dtype=int))):
        assert not record.size_bias
        assert record.bias() is None
    masked = replace(tokens, mask=padding)
    torch.testing.assert_close(masked.bias(), replace(masked, size=None).bias())
    torch.testing.assert_close(tokens.mean(), replace(tokens, size_bias=True).mean())
