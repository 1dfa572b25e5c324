"""TokenLearner and TokenFuser: interface, initialization, dropout, gradients, the record, and errors."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jaxtyping
import pytest
import torch
from torch import Tensor, nn

from fewtokens.errors import FewtokensError
from fewtokens.layers.attention import Attention
from fewtokens.layers.block import Block
from fewtokens.tokenizers.base import LayerContext, Pooler, Tokenizer
from fewtokens.tokenizers.token_fuser import Fuse, TokenFuser
from fewtokens.tokenizers.token_learner import (
    MapPooler,
    MaskMlp,
    TokenLearner,
    TokenLearnerV11,
    TokenLearnerV11Grouped,
    lecun_normal_,
)
from fewtokens.tokens import Tokens

DIM, GRID = 16, (3, 5)
CONTEXT = LayerContext(dim=DIM, heads=2, block=0, depth=1, prefix=1, grid=GRID)
POOLERS = [
    pytest.param(partial(TokenLearner, num_tokens=4), id="1.0 sum"),
    pytest.param(partial(TokenLearner, num_tokens=4, pooling="mean"), id="1.0 mean"),
    pytest.param(partial(TokenLearnerV11, num_tokens=4), id="1.1"),
    pytest.param(partial(TokenLearnerV11Grouped, num_tokens=4), id="1.1 grouped"),
]
Recipe = Callable[[LayerContext], Pooler]


def block() -> Block:
    return Block(DIM, 2, qkv_bias=True, attn_layer=Attention)


def image() -> Tokens:
    return Tokens(torch.randn(2, 1 + 15, DIM), prefix=1, grid=GRID)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn off pytest's type checks, which would reject wrong settings before our own checks do."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


# --- the interface


@torch.no_grad()
def test_the_plain_tokenizer_is_the_block() -> None:
    layer, tokens = block(), image()
    assert torch.equal(Tokenizer(CONTEXT)(tokens, layer).x, layer(tokens).x)
    assert list(Tokenizer(CONTEXT).parameters()) == []


@torch.no_grad()
@pytest.mark.parametrize("build", POOLERS)
def test_a_pooler_pools_and_then_runs_the_block(build: Recipe) -> None:
    tokenizer, layer, tokens = build(CONTEXT), block(), image()
    assert tokenizer.context is CONTEXT
    out = tokenizer(tokens, layer)
    assert torch.equal(out.x, layer(tokenizer.pool(tokens)).x)
    assert out.x.shape == (2, 1 + 4, DIM)


def test_a_new_pooler_must_implement_pool() -> None:
    with pytest.raises(NotImplementedError):
        Pooler(CONTEXT, 1).pool(image())
    with pytest.raises(NotImplementedError):
        MapPooler(CONTEXT, 1).pool(image())


@torch.no_grad()
@pytest.mark.parametrize("build", POOLERS)
def test_the_origin_of_a_pooled_token_is_its_map(build: Recipe) -> None:
    tokenizer, tokens = build(CONTEXT), replace(image(), origin=torch.eye(15).expand(2, 15, 15))
    few = tokenizer.pool(tokens)
    assert few.origin is not None
    assert few.origin.shape == (2, 4, 15)
    assert torch.equal(few.origin, tokenizer.maps(tokens.per_frame, tokens))
    if not isinstance(tokenizer, TokenLearner):  # a softmax over positions, not over tokens
        torch.testing.assert_close(few.origin.sum(dim=2), torch.ones(2, 4))


@torch.no_grad()
@pytest.mark.parametrize("kind", [TokenLearnerV11, TokenLearnerV11Grouped])
def test_forms_without_convolutions_need_no_grid_and_no_order(kind: type[MapPooler]) -> None:
    tokenizer, tokens = kind(CONTEXT, 4), image()
    shuffled = tokens.select(torch.randperm(15).expand(2, 15))
    assert shuffled.grid is None
    torch.testing.assert_close(tokenizer.pool(shuffled).x, tokenizer.pool(tokens).x)


@torch.no_grad()
def test_sizes_are_one_after_pooling() -> None:
    few = TokenLearnerV11(CONTEXT, 4).pool(replace(image(), size=torch.full((2, 16), 3.0)))
    assert few.size is not None
    assert few.size.tolist() == [[1.0] * 5] * 2


@torch.no_grad()
def test_token_fuser_keeps_grid_frames_sizes_and_origin() -> None:
    tokens = replace(image(), size=torch.full((2, 16), 3.0), origin=torch.eye(15).expand(2, 15, 15))
    out = TokenFuser(CONTEXT, partial(TokenLearner, num_tokens=4))(tokens, block())
    assert (out.x.shape, out.prefix, out.frames, out.grid) == (tokens.x.shape, 1, 1, GRID)
    assert out.size is tokens.size
    assert out.origin is tokens.origin


# --- dropout


@torch.no_grad()
def test_dropout_of_11_sets_logits_to_zero_and_is_off_in_eval() -> None:
    """As in scenic, it acts on the logits, so a dropped position has the weight exp(0) and is not removed."""
    tokenizer = TokenLearnerV11(CONTEXT, 4, dropout=0.5)
    seen: list[Tensor] = []
    tokenizer.mlp.register_forward_hook(lambda _, __, out: seen.append(out))
    tokenizer.train().pool(Tokens(torch.randn(8, 15, DIM), grid=GRID))
    assert 0.4 < (seen[0] == 0).float().mean().item() < 0.6
    tokenizer.eval().pool(Tokens(torch.randn(8, 15, DIM), grid=GRID))
    assert (seen[1] != 0).all()


@torch.no_grad()
def test_other_dropouts_act_on_the_values_and_on_the_output_in_training_only() -> None:
    grouped, tokens = TokenLearnerV11Grouped(CONTEXT, 4, dropout=0.5), image()
    assert 0.3 < (grouped.train().values(tokens.patches) == 0).float().mean().item() < 0.7
    assert (grouped.eval().values(tokens.patches) != 0).all()
    fuse, few = Fuse(DIM, 4, dropout=0.5), torch.randn(2, 4, DIM)
    nn.init.ones_(fuse.gain)
    assert 0.3 < (fuse.train()(few, tokens.patches) == 0).float().mean().item() < 0.7
    assert (fuse.eval()(few, tokens.patches) != 0).all()


# --- initialization


def test_lecun_normal_has_variance_one_over_fan_in_and_is_truncated_at_two_deviations() -> None:
    """These are deviations of the normal before truncation, which are 1 / 0.8796 times those afterwards."""
    weight = torch.empty(64, 32, 3, 3)
    lecun_normal_(weight)
    std = (32 * 9) ** -0.5
    assert weight.std().item() == pytest.approx(std, rel=0.02)
    assert abs(weight.mean().item()) < 0.02 * std
    limit = 2 * std / 0.8796256610342398
    assert 0.95 * limit < weight.abs().max().item() <= limit


def test_token_learner_10_and_grouped_are_initialized_as_lecun_normal() -> None:
    wide = LayerContext(dim=384, heads=2, block=0, depth=1)
    tokenizer, grouped = TokenLearner(wide, 16), TokenLearnerV11Grouped(wide, 16, groups=4)
    assert tokenizer.convs[0].weight.std().item() == pytest.approx((384 * 9) ** -0.5, rel=0.05)
    for conv in tokenizer.convs[1:]:
        assert conv.weight.std().item() == pytest.approx((16 * 9) ** -0.5, rel=0.1)
    for conv in (grouped.group, grouped.value):
        assert conv.weight.std().item() == pytest.approx((384 / 4) ** -0.5, rel=0.05)
    assert grouped.project.weight.std().item() == pytest.approx(384**-0.5, rel=0.05)
    convolutions = [*tokenizer.convs, grouped.group, grouped.project, grouped.value]
    assert all(conv.bias is None for conv in convolutions)


def test_the_mask_mlp_is_initialized_as_in_flax() -> None:
    mlp = MaskMlp(384, 64, 16, 0.0, "tanh")
    for layer in (mlp.fc1, mlp.fc2):
        bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert 0.98 * bound < layer.weight.abs().max().item() <= bound
        assert 0 < layer.bias.abs().max().item() < 6e-6


@torch.no_grad()
def test_sum_pooling_starts_with_large_and_equal_tokens_and_mean_pooling_does_not() -> None:
    """Measured with the official code: std 7 at 14x14 and width 192, since all sigmoids are about 0.5."""
    at, x = LayerContext(dim=192, heads=3, block=0, depth=1), torch.randn(4, 196, 192)
    tokens = Tokens(x, grid=(14, 14))
    summed, mean = TokenLearner(at, 8).pool(tokens).x, TokenLearner(at, 8, pooling="mean").pool(tokens).x
    assert 5 < summed.std().item() < 9
    assert torch.corrcoef(summed[0]).mean().item() > 0.95
    assert mean.std().item() == pytest.approx(7 / 196, rel=0.3)
    assert TokenLearner(at, 8).pool(replace(tokens, x=x + 1)).x.mean().item() == pytest.approx(98, rel=0.1)
    assert TokenLearnerV11(at, 8).pool(tokens).x.std().item() < 0.2


@torch.no_grad()
@pytest.mark.parametrize("init", ["gentle", "official"])
@pytest.mark.parametrize("normalize", [True, False])
def test_token_fuser_starts_as_the_identity_on_patches(init: str, normalize: bool) -> None:
    fuse = Fuse(DIM, 4, init=init, normalize=normalize)
    assert (fuse(torch.randn(2, 4, DIM), torch.randn(2, 15, DIM)) == 0).all()
    tokenizer = TokenFuser(CONTEXT, partial(TokenLearnerV11, num_tokens=4), init=init, normalize=normalize)
    tokens = image()
    assert torch.equal(tokenizer(tokens, block()).patches, tokens.patches)


# --- gradients


NOISE = 1e-10  # far above the rounding of float64, far below any real gradient here


def gradients(tokenizer: Tokenizer, layer: Block, tokens: Tokens, target: Tensor) -> dict[str, float]:
    """Largest gradient of each parameter of tokenizer and block, in float64."""
    for module in (tokenizer, layer):
        module.double().zero_grad()
    patches = tokenizer(tokens.update(tokens.x.double()), layer).patches
    (patches * target[:, : patches.shape[1]]).sum().backward()
    named = [*tokenizer.named_parameters(), *((f"block.{name}", p) for name, p in layer.named_parameters())]
    return {name: 0.0 if p.grad is None else p.grad.abs().max().item() for name, p in named}


def without_gradient(found: dict[str, float]) -> set[str]:
    return {name for name, size in found.items() if size < NOISE}


@pytest.mark.parametrize("build", POOLERS)
def test_gradients_reach_every_parameter_of_a_token_learner(build: Recipe) -> None:
    """Exceptions are parameters that add the same number to a token's logits at all positions, which a softmax over
    positions ignores. The official forms have the same parameters.
    """
    tokenizer = build(CONTEXT)
    found = gradients(tokenizer, block(), image(), torch.randn(2, 15, DIM))
    blind = {TokenLearner: set(), TokenLearnerV11: {"mlp.fc2.bias"}, TokenLearnerV11Grouped: {"norm.bias"}}
    assert without_gradient(found) == blind[type(tokenizer)]


@pytest.mark.parametrize("build", POOLERS)
def test_gradients_reach_every_patch_of_the_input(build: Recipe) -> None:
    tokens = image()
    tokens.x.requires_grad_()
    build(CONTEXT)(tokens, block()).patches.square().sum().backward()
    assert tokens.x.grad is not None
    assert (tokens.x.grad.abs().sum(dim=2) > 0).all()


@pytest.mark.parametrize(
    ("init", "normalize", "first"),
    [
        # The mixing is zero: no gradient passes to the maps or to the tokens, and norm2 of zeros has no direction.
        ("official", True, {"fuse.mix.weight", "fuse.norm2.bias"}),
        ("official", False, {"fuse.mix.weight", "fuse.mix.bias"}),
        # The gain of the output is zero: only it changes in the first step, and everything else from the second on.
        ("gentle", True, {"fuse.gain"}),
        ("gentle", False, {"fuse.gain"}),
    ],
)
def test_gradients_of_the_token_fuser(init: str, normalize: bool, first: set[str]) -> None:
    """In the first step, only the parameters in `first` have a gradient from the patches. After one step all have one,
    except the bias of the mixing under norm2: it is equal in all channels, which a norm over channels removes.
    """
    inner = partial(TokenLearner, num_tokens=4)
    tokenizer, layer = TokenFuser(CONTEXT, inner, init=init, normalize=normalize), block()
    tokens, target = image(), torch.randn(2, 15, DIM)
    found = gradients(tokenizer, layer, tokens, target)
    assert set(found) - without_gradient(found) == first
    torch.optim.SGD([*tokenizer.parameters(), *layer.parameters()], lr=1e-2).step()
    blind = {"fuse.mix.bias"} if normalize else set()
    assert without_gradient(gradients(tokenizer, layer, tokens, target)) == blind


def test_the_gentle_start_of_the_token_fuser_is_gentler() -> None:
    """A step of 1e-6 leaves the gentle fuser near zero and moves the official one far (a norm of a zero vector)."""
    moved = {}
    for init in ("official", "gentle"):
        torch.manual_seed(0)
        fuse, tokens, original = Fuse(DIM, 4, init=init), torch.randn(2, 4, DIM), torch.randn(2, 15, DIM)
        (fuse(tokens, original) * torch.randn(2, 15, DIM)).sum().backward()
        torch.optim.SGD(fuse.parameters(), lr=1e-6).step()
        moved[init] = fuse(tokens, original).std().item()
    assert moved["gentle"] < 1e-4
    assert moved["official"] > 100 * moved["gentle"]


# --- errors


NUM_TOKENS = r"^`tokenizer\.build\.num_tokens` must be an int >= 1, or a float above 0 and at most 1, got "
GELU = r"^`tokenizer\.build\.gelu` must be 'tanh' or 'none', got 'erf'\.$"
GROUPS = r"^`tokenizer\.build\.groups` must be a divisor of the model's width 16, got "


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (partial(TokenLearner, num_tokens=0), NUM_TOKENS + r"0\.$"),
        (partial(TokenLearnerV11, num_tokens=-1), NUM_TOKENS + r"-1\.$"),
        (partial(TokenLearner, pooling="max"), r"^`tokenizer\.build\.pooling` must be 'sum' or 'mean', got 'max'\.$"),
        (partial(TokenLearner, gelu="erf"), GELU),
        (partial(TokenLearnerV11, gelu="erf"), GELU),
        (partial(TokenFuser, inner=TokenLearner, gelu="erf"), GELU),
        (partial(TokenLearnerV11Grouped, groups=5), GROUPS + r"5\.$"),
        (partial(TokenLearnerV11Grouped, groups=0), GROUPS + r"0\.$"),
        (
            partial(TokenFuser, inner=Tokenizer),
            r"^TokenFuser wraps tokenizers that make a fixed number of tokens, .* got Tokenizer\. Set tokenizer@tokeni",
        ),
        (
            partial(TokenFuser, inner=TokenLearner, init="zero"),
            r"^`tokenizer\.build\.init` must be 'gentle' or 'official', got 'zero'\.$",
        ),
    ],
)
def test_invalid_settings(build: Callable[[LayerContext], Tokenizer], message: str) -> None:
    with pytest.raises(FewtokensError, match=message):
        build(CONTEXT)


def test_token_learner_10_needs_a_complete_grid() -> None:
    message = (
        r"^TokenLearner 1\.0, a convolution over positions, needs patch tokens on a complete \(height, width\) grid, "
        r"but an earlier tokenizer dropped or merged some and left 4\. Place it before that tokenizer, or use token_l"
    )
    few = TokenLearnerV11(CONTEXT, 4).pool(image())
    with pytest.raises(FewtokensError, match=message):
        TokenLearner(CONTEXT, 2).pool(few)


@pytest.mark.parametrize("build", POOLERS)
def test_padding_is_an_error(build: Recipe) -> None:
    tokenizer = build(CONTEXT)
    padded = replace(image(), mask=torch.ones(2, 16, dtype=torch.bool))
    message = (
        rf"^{type(tokenizer).__name__} makes the same number of tokens of every sample and takes no padded tokens, but "
        r"an adaptive tokenizer before it has padded them\. Place it before that tokenizer\.$"
    )
    with pytest.raises(FewtokensError, match=message):
        tokenizer.pool(padded)
    with pytest.raises(FewtokensError, match=message):
        TokenFuser(CONTEXT, build)(padded, block())
