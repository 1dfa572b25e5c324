"""The ViT: the models it builds, its poolings, and its errors."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fewtokens.backbones.vit import ViT, vit
from fewtokens.errors import FewtokensError
from fewtokens.tokenizers.base import Tokenizer
from fewtokens.tokenizers.token_fuser import TokenFuser
from fewtokens.tokenizers.token_learner import TokenLearner, TokenLearnerV11
from fewtokens.tokens import Tokens

NONE = {"at": 0, "build": Tokenizer}
SIZES: dict[str, Any] = {"image_size": (8, 16), "patch_size": 4, "num_classes": 5, "dim": 16, "depth": 2, "heads": 2}
POOLS = ["token", "avg", "max", "avgmax", "map"]


def build(**changes: Any) -> ViT:
    torch.manual_seed(0)
    return vit(**{"tokenizer": NONE, **SIZES, **changes}).eval()


def images(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 3, 8, 16)), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable pytest's type checks, which would reject wrong settings before our own checks do."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@torch.no_grad()
@pytest.mark.parametrize("pool", POOLS)
def test_the_plain_model_equals_timms_with_the_same_arguments(pool: str) -> None:
    ours = build(pool=pool, options={"mlp_ratio": 2, "reg_tokens": 2})
    torch.manual_seed(0)
    theirs = VisionTransformer(
        img_size=(8, 16),
        patch_size=4,
        num_classes=5,
        embed_dim=16,
        depth=2,
        num_heads=2,
        mlp_ratio=2,
        reg_tokens=2,
        class_token=pool == "token",
        global_pool=pool,
    ).eval()
    assert torch.equal(ours(images()), theirs(images()))


@torch.no_grad()
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("norm", [None, "before_pool", "after_pool"])
def test_the_norm_is_before_or_after_the_pooling(norm: str | None, pool: str) -> None:
    """By default it is where timm puts it: after the pooling for avg, max and avgmax."""
    model = build(pool=pool, norm=norm)
    after = pool in ("avg", "max", "avgmax") if norm is None else norm == "after_pool"
    x = model.encoder(model.embed(images())).x
    vit, layer_norm = model.vit, model.vit.fc_norm if after else model.vit.norm
    expected = layer_norm(vit.pool(x)) if after else vit.pool(layer_norm(x))
    assert torch.equal(model(images()), vit.head(expected))


@torch.no_grad()
def test_embed_returns_prefix_and_grid() -> None:
    tokens = build(options={"reg_tokens": 2}).embed(images())
    assert (tokens.prefix, tokens.frames, tokens.grid) == (3, 1, (2, 4))
    assert tokens.x.shape == (2, 3 + 8, 16)
    assert tokens.size is tokens.mask is tokens.origin is tokens.trace is None


@torch.no_grad()
def test_sizes_may_be_pairs_and_patches_rectangular() -> None:
    assert build(image_size=[8, 12], patch_size=[4, 2]).embed(images(1, 3, 8, 12)).grid == (2, 6)


def test_the_context_describes_the_backbone() -> None:
    context = build(options={"reg_tokens": 2}).encoder.tokenizers[1].context
    assert (context.dim, context.heads, context.block, context.depth) == (16, 2, 1, 2)
    assert (context.prefix, context.class_token, context.frames, context.grid) == (3, True, 1, (2, 4))
    assert not build(pool="avg").encoder.tokenizers[0].context.class_token


@torch.no_grad()
def test_dynamic_image_size_gives_the_grid_of_each_image() -> None:
    model = build(options={"dynamic_img_size": True}, tokenizer={"at": 1, "build": partial(TokenLearner, num_tokens=3)})
    assert model.embed(images(1, 3, 12, 20)).grid == (3, 5)
    assert model(images(1, 3, 12, 20)).shape == (1, 5)


def test_with_patch_dropout_there_is_no_grid_in_training_only() -> None:
    model = build(options={"patch_drop_rate": 0.5})
    assert model.train().embed(images()).grid is None
    assert model.eval().embed(images()).grid == (2, 4)


@torch.no_grad()
def test_trace_follows_every_patch_through_every_block() -> None:
    model = build(depth=3, tokenizer={"at": 1, "build": partial(TokenLearnerV11, num_tokens=3)})
    first, second, third = model.trace(images())
    assert [r.num_patches for r in (first, second, third)] == [8, 3, 3]
    assert torch.equal(first.origin, torch.eye(8).expand(2, -1, -1))
    torch.testing.assert_close(second.origin.sum(dim=2), torch.ones(2, 3))
    assert torch.equal(third.origin, second.origin)
    torch.testing.assert_close(model.classify(third), model(images()), rtol=0, atol=0)


@torch.no_grad()
def test_trace_of_a_fuser_shows_the_few_tokens_in_the_block() -> None:
    inner = partial(TokenLearnerV11, num_tokens=3)
    model = build(depth=3, tokenizer={"at": "1:", "build": partial(TokenFuser, inner=inner)})
    records = model.trace(images())
    assert [r.num_patches for r in records] == [8, 3, 3]
    assert all(r.origin.shape == (2, r.num_patches, 8) for r in records)


# --- the head, for tokens with sizes and padding


def pooled(pool: str, **options: Any) -> tuple[ViT, Tokens]:
    """Return a model with a class token wherever timm allows one, and tokens as its encoder could return them."""
    model = build(pool=pool, options={"class_token": True, **options})
    return model, Tokens(torch.randn(2, 1 + 6, 16), prefix=1)


@torch.no_grad()
@pytest.mark.parametrize("include_prefix", [False, True])
@pytest.mark.parametrize("pool", POOLS)
def test_padding_does_not_reach_the_logits(pool: str, include_prefix: bool) -> None:
    model, tokens = pooled(pool, pool_include_prefix=include_prefix)
    padded = torch.cat([tokens.x, 100 * torch.randn(2, 3, 16)], dim=1)
    mask = torch.tensor([True] * 7 + [False] * 3).expand(2, -1)
    expected = model.vit.forward_head(model.vit.norm(tokens.x))
    torch.testing.assert_close(model.classify(Tokens(padded, prefix=1, mask=mask)), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("include_prefix", [False, True])
@pytest.mark.parametrize("pool", POOLS)
def test_a_token_of_size_three_counts_as_three(pool: str, include_prefix: bool) -> None:
    model, tokens = pooled(pool, pool_include_prefix=include_prefix)
    copies = torch.tensor([1, 1, 3, 1, 1, 2, 1])
    repeated = model.vit.forward_head(model.vit.norm(tokens.x.repeat_interleave(copies, dim=1)))
    sized = replace(tokens, size=copies.float().expand(2, -1))
    torch.testing.assert_close(model.classify(sized), repeated, rtol=1e-5, atol=1e-6)


def test_no_weight_decay_names_positions_class_and_register_tokens() -> None:
    model = build(options={"reg_tokens": 2})
    named = {name for name, _ in model.named_parameters()}
    assert model.no_weight_decay() & named == {"vit.pos_embed", "vit.cls_token", "vit.reg_token"}


# --- errors


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"patch_size": 5},
            r"Patches of 5x5 pixels do not tile an image of 8x16\. Set backbone\.patch_size to a divisor, or resize "
            r"the data with data\.image_size\.$",
        ),
        ({"patch_size": 0}, r"Patches of 0x0 pixels do not tile"),
        ({"patch_size": 16}, r"Patches of 16x16 pixels do not tile"),
        ({"patch_size": (4, 3)}, r"Patches of 4x3 pixels do not tile"),
        ({"heads": 3}, r"`backbone\.heads` must be a divisor of backbone\.dim=16, got 3\.$"),
        ({"heads": 0}, r"`backbone\.heads` must be a divisor of backbone\.dim=16, got 0\.$"),
        ({"dim": 0}, r"`backbone\.dim` must be an int >= 1, got 0\.$"),
        ({"channels": -1}, r"`data\.channels` must be an int >= 1, got -1\.$"),
        ({"depth": 0}, r"`backbone\.depth` must be an int >= 1, got 0\.$"),
        (
            {"options": {"mlp_rato": 2}},
            r"`backbone\.options` must be arguments of timm's VisionTransformer, got \{.*'mlp_rato': 2\}: "
            r".*'mlp_rato'.*\. See help\(timm\.models\.vision_transformer\.VisionTransformer\)\.$",
        ),
        ({"pool": "median"}, r"`backbone\.options` must be arguments of timm's .*'median'"),
        ({"norm": "after"}, r"`backbone\.norm` must be 'before_pool', 'after_pool' or null, got 'after'\.$"),
        (
            {"norm": "after_pool", "options": {"fc_norm": False}},
            r"backbone\.norm=after_pool and backbone\.options\.fc_norm=False set the same thing\. Set only one\.$",
        ),
        (
            {"options": {"class_token": False}},
            r"`backbone\.options` must be arguments of timm's .*'class_token': False",
        ),
        ({"options": {"qk_norm": "abc"}}, r"`backbone\.options\.qk_norm` must be true or false, got 'abc'"),
        ({"options": {"reg_tokens": 1.5}}, r"`backbone\.options\.reg_tokens` must be an int, got 1\.5"),
        ({"options": {"init_values": "x"}}, r"`backbone\.options\.init_values` must be a number or null, got 'x'"),
        ({"options": {"mlp_ratio": 0}}, r"`backbone\.options\.mlp_ratio` must be a number > 0, got 0"),
        ({"options": {"drop_path_rate": 1}}, r"`backbone\.options\.drop_path_rate` must be a share in \[0, 1\), got 1"),
        ({"options": {"norm_layer": "nonorm"}}, r"`backbone\.options` must be arguments of timm's .*nonorm"),
    ],
)
def test_invalid_settings_are_an_error(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(FewtokensError, match=f"(?s)^{said}"):
        build(**changes)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 8, 16), (3, 8, 16), (2, 4, 3, 8, 16)], ids=str)
def test_images_of_another_size_are_an_error(shape: tuple[int, ...]) -> None:
    said = (
        r"^The model was built for images \(batch, channels, height, width\) = \(B, 3, 8, 16\), got "
        rf"{re.escape(str(shape))}\. Resize the images, or build the model for their size \(data\.image_size, "
        r"data\.channels\)\.$"
    )
    check: Callable[[Tensor], object] = build().embed
    with pytest.raises(FewtokensError, match=said):
        check(images(*shape))


@pytest.mark.parametrize("shape", [(2, 1, 8, 16), (2, 3, 9, 16)], ids=str)
def test_a_dynamic_image_size_still_needs_complete_patches_and_the_right_channels(shape: tuple[int, ...]) -> None:
    said = (
        r"^The model was built for images .* = \(B, 3, a multiple of 4, a multiple of 4\), got "
        rf"{re.escape(str(shape))}\. Resize the images, or build"
    )
    with pytest.raises(FewtokensError, match=said):
        build(options={"dynamic_img_size": True}).embed(images(*shape))


def test_fixed_positions_are_sines_and_cosines_of_column_and_row() -> None:
    """The values are those of big_vision's posemb_sincos_2d: sin(x), cos(x), sin(y), cos(y) for every frequency."""
    model = build(pool="avg", positions="sincos2d")
    table = model.vit.pos_embed
    frequencies = 10_000.0 ** -(np.arange(4) / 3)
    for row, column in np.ndindex(2, 4):
        x, y = column * frequencies, row * frequencies
        expected = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)])
        np.testing.assert_allclose(table[0, 4 * row + column].numpy(), expected, atol=1e-6)
    assert not table.requires_grad
    assert build(pool="avg").vit.pos_embed.requires_grad
    with pytest.raises(FewtokensError, match=r"`backbone\.pool` must be avg, max or map with fixed positions"):
        build(pool="token", positions="sincos2d")
    with pytest.raises(FewtokensError, match=r"a multiple of 4 above 4"):
        build(pool="avg", positions="sincos2d", dim=18)
