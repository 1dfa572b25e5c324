"""The Keras example's mini ViT: its published counts, its initialization, and its differences from an ordinary ViT."""

from functools import partial

import pytest
import torch
from torch import nn

from fewtokens.backbones.keras_mini_vit import KerasMlp, keras_mini_vit
from fewtokens.backbones.vit import ViT
from fewtokens.errors import FewtokensError
from fewtokens.tokenizers.base import Tokenizer
from fewtokens.tokenizers.token_fuser import TokenFuser
from fewtokens.tokenizers.token_learner import TokenLearner, TokenLearnerV11, TokenLearnerV11Grouped

V10 = partial(TokenLearner, pooling="mean", gelu="none")


def example(build: object = Tokenizer, at: int = 3, depth: int = 4) -> ViT:
    torch.manual_seed(0)
    return keras_mini_vit(
        image_size=48, patch_size=6, num_classes=10, depth=depth, tokenizer={"at": at, "build": build}
    ).eval()


@pytest.mark.parametrize(
    ("build", "depth", "count"),
    [
        (Tokenizer, 4, 1_336_458),
        (partial(V10, num_tokens=8), 4, 1_336_458 + 11_200),
        (partial(V10, num_tokens=4), 4, 1_336_458 + 5_296),
        (partial(TokenLearnerV11Grouped, groups=4, num_tokens=4), 4, 1_345_418),
        (partial(TokenLearnerV11Grouped, groups=8, num_tokens=8), 4, 1_341_834),
        (partial(TokenLearnerV11Grouped, groups=4, num_tokens=8), 4, 1_345_930),
        (Tokenizer, 8, 2_657_418),
    ],
)
def test_the_number_of_trainable_parameters_is_keras_count(build: object, depth: int, count: int) -> None:
    model = example(build, depth=depth)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    frozen = {name: p.shape for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"vit.pos_embed": (1, 64, 128)}  # the only parameter that is not trained in Keras


def test_positions_are_not_trained() -> None:
    model = example()
    positions = model.vit.pos_embed.clone()
    model(torch.rand(2, 3, 48, 48)).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert torch.equal(model.vit.pos_embed, positions)
    assert 0.049 < positions.abs().max().item() <= 0.05
    assert positions.std().item() == pytest.approx(0.05 / 3**0.5, rel=0.02)


def glorot_std(fans: int) -> float:
    return (2 / fans) ** 0.5


def test_kernels_start_glorot_uniform_with_kerass_fans_and_biases_at_zero() -> None:
    model = example(partial(V10, num_tokens=8))
    block, learner = model.encoder.blocks[0], model.encoder.tokenizers[3]
    expected = {
        model.vit.patch_embed.proj: 36 * (3 + 128),
        block.attn.qkv: 128 * (4 + 128),  # (width, heads, head width): Keras treats the width as a window
        block.attn.proj: 4 * (128 + 128),
        block.mlp.fc1: 128 + 256,
        block.mlp.fc2: 256 + 128,
        model.vit.head: 128 + 10,
        learner.convs[0]: 9 * (128 + 8),
        learner.convs[1]: 9 * (8 + 8),
    }
    for layer, fans in expected.items():
        std = glorot_std(fans)
        assert layer.weight.std().item() == pytest.approx(std, rel=0.06)
        assert 0.98 * 3**0.5 * std < layer.weight.abs().max().item() <= 3**0.5 * std
        assert layer.bias is None or (layer.bias == 0).all()


def test_grouped_kernels_count_the_channels_of_a_group_as_their_fan_in() -> None:
    learner = example(partial(TokenLearnerV11Grouped, groups=4)).encoder.tokenizers[3]
    assert learner.group.weight.std().item() == pytest.approx(glorot_std(128 // 4 + 128), rel=0.03)


@torch.no_grad()
def test_heads_are_as_wide_as_the_model_and_the_mlp_ends_in_a_gelu() -> None:
    model = example()
    attention = model.encoder.blocks[0].attn
    assert (attention.num_heads, attention.head_dim, attention.scale) == (4, 128, 128**-0.5)
    assert attention.qkv.weight.shape == (3 * 512, 128)
    mlp, x = model.encoder.blocks[0].mlp, torch.randn(2, 5, 128)
    gelu = nn.functional.gelu
    assert isinstance(mlp, KerasMlp)
    assert torch.equal(mlp(x), gelu(mlp.fc2(gelu(mlp.fc1(x)))))


def test_dropout_acts_everywhere_except_on_the_output_of_attention() -> None:
    model = example()
    assert model.vit.pos_drop.p == 0.1
    for block in model.encoder.blocks:
        assert (block.attn.attn_drop.p, block.attn.proj_drop.p) == (0.1, 0)
        assert (block.mlp.drop1.p, block.mlp.drop2.p) == (0.1, 0.1)


@torch.no_grad()
def test_the_head_is_norm_mean_dense() -> None:
    model, images = example(partial(V10, num_tokens=8)), torch.rand(2, 3, 48, 48)
    tokens = model.encoder(model.embed(images))
    assert (tokens.prefix, tokens.num_patches) == (0, 8)
    assert torch.equal(model(images), model.vit.head(model.vit.norm(tokens.x).mean(dim=1)))


def test_sizes_are_checked_as_for_every_vit() -> None:
    with pytest.raises(FewtokensError, match=r"^Patches of 7x7 pixels do not tile an image of 48x48\."):
        keras_mini_vit(image_size=48, patch_size=7, num_classes=10, tokenizer={"at": 0, "build": Tokenizer})
    with pytest.raises(FewtokensError, match=r"^`backbone\.heads` must be a divisor of backbone\.dim=128, got 3\."):
        keras_mini_vit(image_size=48, patch_size=6, num_classes=10, heads=3, tokenizer={"at": 0, "build": Tokenizer})


@pytest.mark.parametrize("init", ["gentle", "official"])
@torch.no_grad()
def test_a_fuser_inside_still_starts_as_the_identity(init: str) -> None:
    """Keras's initialization applies to the parts of the example only; a fuser keeps its own."""
    inner = partial(TokenLearnerV11, num_tokens=4)
    model, images = example(partial(TokenFuser, inner=inner, init=init)), torch.rand(1, 3, 48, 48)
    before, after = model.trace(images)[2].x, model.encoder(model.embed(images)).x
    assert torch.equal(after, before)


@pytest.mark.parametrize("setting", ["channels", "key_dim", "depth"])
def test_sizes_below_one_are_an_error(setting: str) -> None:
    sizes = {"image_size": 12, "patch_size": 6, "num_classes": 3, "tokenizer": {"at": [], "build": Tokenizer}}
    with pytest.raises(FewtokensError, match=rf"^`\w+\.{setting}` must be an int >= 1, got 0\.$"):
        keras_mini_vit(**sizes, **{setting: 0})
