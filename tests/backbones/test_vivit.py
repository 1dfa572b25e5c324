"""ViViT: its four models, their published costs, tokenizers in each, and errors."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import jaxtyping
import pytest
import torch
from torch import Tensor, nn

from fewtokens.analysis.cost import macs, tokens_per_block
from fewtokens.backbones.vit import ViT, vit
from fewtokens.backbones.vivit import FactorisedEncoder, Model, ViViT, vivit
from fewtokens.errors import FewtokensError
from fewtokens.layers.block import Block
from fewtokens.layers.embedding import Tubelets
from fewtokens.layers.factorised import DotProductBlock, SelfAttentionBlock
from fewtokens.tokenizers.ats import ATS
from fewtokens.tokenizers.base import Tokenizer
from fewtokens.tokenizers.evit import EViT
from fewtokens.tokenizers.fixed_pattern import FixedPattern
from fewtokens.tokenizers.patch_merger import PatchMerger
from fewtokens.tokenizers.pool import Pool
from fewtokens.tokenizers.random_drop import RandomDrop
from fewtokens.tokenizers.token_fuser import TokenFuser
from fewtokens.tokenizers.token_learner import TokenLearner, TokenLearnerV11
from fewtokens.tokenizers.tome import ToMe
from fewtokens.tokenizers.top_k import TopK
from fewtokens.tokens import Tokens

NONE = {"at": [], "build": Tokenizer}
MODELS = get_args(Model)
OVER_TIME = MODELS[2:]  # models that attend over the time steps of every position
CUT = Tubelets(clip_frames=6, image_size=(8, 12), frames=2, height=4, width=4)  # 3 time steps of 2 x 3
SIZES: dict[str, Any] = {"num_classes": 5, "dim": 16, "depth": 3, "heads": 2, "temporal_depth": 2}


def build(model: str = "spatio_temporal", **changes: Any) -> ViViT:
    torch.manual_seed(0)
    return vivit(**{"tubelets": CUT, "tokenizer": NONE, "model": model, **SIZES, **changes}).eval()


def clips(count: int = 2, cut: Tubelets = CUT) -> Tensor:
    shape = (count, cut.channels, cut.clip_frames, *cut.sides)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable pytest's type checks, which would reject wrong settings before our own checks do."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


# --- the models


@pytest.mark.parametrize(
    ("model", "gmacs", "million"),
    [
        ("spatio_temporal", 455.2, 88.9),
        ("factorised_encoder", 284.4, 115.1),
        ("factorised_self_attention", 372.3, 117.3),
        ("factorised_self_attention_time_space", 372.3, 117.3),
        ("factorised_dot_product", 277.1, 88.9),
    ],
)
def test_cost_of_vivit_b_is_within_one_percent_of_the_published_one(model: Model, gmacs: float, million: float) -> None:
    """Paper, table 1. Ours are 0.3 to 0.8 % lower, since softmax, norms and GELU are not counted."""
    with torch.device("meta"):
        cut = Tubelets(clip_frames=32, image_size=224)
        net = vivit(tubelets=cut, num_classes=400, tokenizer=NONE, dim=768, depth=12, heads=12, model=model)
        found = macs(net, torch.zeros(1, 3, 32, 224, 224)) / 1e9
    assert -0.01 * gmacs < found - gmacs <= 0
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(million, rel=1e-3)


def test_cost_of_token_learner_in_vivit_l_is_within_one_percent_of_the_published_one() -> None:
    """With 16 tokens per time step before block 12 of L/16: 766 of 1446 GFLOPs per view (TokenLearner, journal)."""
    counts = []
    for build_tokenizer, at in ((Tokenizer, []), (partial(TokenLearner, num_tokens=16), 12)):
        with torch.device("meta"):
            cut, tokenizer = Tubelets(clip_frames=32, image_size=224), {"at": at, "build": build_tokenizer}
            sizes = {"num_classes": 400, "dim": 1024, "depth": 24, "heads": 16, "pool": "avg"}
            net = vivit(tubelets=cut, tokenizer=tokenizer, **sizes)
            counts.append(macs(net, torch.zeros(1, 3, 32, 224, 224)) / 1e9)
    assert counts == pytest.approx([1446, 766], rel=0.01)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("pool", [None, "avg"])
def test_macs_are_the_closed_form(model: Model, pool: str | None) -> None:
    t, n, c = 3, 6, 16
    token = int(pool is None and model in MODELS[:2])

    def blocks(depth: int, rows: int, attention: int) -> int:
        return depth * (12 * rows * c**2 + 2 * attention * c)

    n1 = t * n + token
    expected = {
        "spatio_temporal": blocks(3, n1, n1**2),
        "factorised_encoder": t * blocks(3, n + token, (n + token) ** 2) + blocks(2, t + token, (t + token) ** 2),
        "factorised_dot_product": blocks(3, t * n, (t * n**2 + n * t**2) // 2),
    }.get(model, blocks(3, t * n, t * n**2 + n * t**2) + 3 * 4 * t * n * c**2)
    assert macs(build(model, pool=pool), clips(1)) == t * n * (3 * 2 * 4 * 4) * c + expected + c * 5


@pytest.mark.parametrize(
    ("model", "kind", "block"),
    [
        ("spatio_temporal", ViViT, Block),
        ("factorised_encoder", FactorisedEncoder, Block),
        ("factorised_self_attention", ViViT, SelfAttentionBlock),
        ("factorised_dot_product", ViViT, DotProductBlock),
    ],
)
def test_models_share_encoder_blocks_and_names(model: Model, kind: type, block: type) -> None:
    net = build(model)
    assert type(net) is kind
    assert all(type(b) is block for b in net.encoder.blocks)
    image = vit(image_size=(8, 12), patch_size=4, num_classes=5, dim=16, depth=3, heads=2, tokenizer=NONE)
    names = {name for name in image.state_dict() if not name.startswith(("vit.head", "vit.cls"))}
    assert names <= set(net.state_dict())
    norms = [layer for layer in net.modules() if isinstance(layer, nn.LayerNorm)]
    assert {layer.eps for layer in norms} == {1e-6}
    named = {name for name, p in net.named_parameters() if name.endswith(("pos_embed", "cls_token"))}
    assert named == net.no_weight_decay() & set(dict(net.named_parameters()))
    assert (net.sample_shape, image.sample_shape) == ((3, 6, 8, 12), (3, 8, 12))


def test_the_two_orders_of_model_3_have_the_same_parameters() -> None:
    one, other = build("factorised_self_attention"), build("factorised_self_attention_time_space")
    for parameter in one.parameters():
        nn.init.normal_(parameter, std=0.3)
    other.load_state_dict(one.state_dict())
    assert not torch.allclose(one(clips()), other(clips()), atol=1e-2)


def test_the_context_holds_the_time_steps() -> None:
    for model in MODELS:
        context = build(model).encoder.tokenizers[1].context
        assert (context.frames, context.grid) == (1 if model == "factorised_encoder" else 3, (2, 3))
        assert context.class_token == (model in MODELS[:2])
        assert (context.dim, context.heads, context.block, context.depth) == (16, 2, 1, 3)


@torch.no_grad()
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "map"])
def test_every_pooling(model: Model, pool: str) -> None:
    logits = build(model, pool=pool)(clips())
    assert logits.shape == (2, 5)
    assert logits.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("model", MODELS)
def test_the_norm_comes_before_the_pooling_by_default(model: Model) -> None:
    default, before, after = (build(model, pool="avg", norm=norm) for norm in (None, "before_pool", "after_pool"))
    for net in (default, before):
        assert isinstance(net.vit.norm, nn.LayerNorm)
        assert isinstance(net.vit.fc_norm, nn.Identity)
    assert isinstance(after.vit.norm, nn.Identity)
    assert isinstance(after.vit.fc_norm, nn.LayerNorm)
    assert torch.equal(default(clips()), before(clips()))
    assert not torch.allclose(before(clips()), after(clips()), atol=1e-4)
    if isinstance(after, FactorisedEncoder):
        assert isinstance(after.temporal.vit.fc_norm, nn.LayerNorm), "both encoders"


@torch.no_grad()
@pytest.mark.parametrize("model", MODELS)
def test_a_clip_of_one_frame_is_an_image(model: Model) -> None:
    cut = Tubelets(clip_frames=1, image_size=8, frames=1, height=4, width=4)
    net = build(model, tubelets=cut)
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(net(images), net(images[:, :, None]))


@torch.no_grad()
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_model_1_of_one_frame_is_the_vit(pool: str) -> None:
    cut = Tubelets(clip_frames=1, image_size=8, frames=1, height=4, width=4)
    net = build(tubelets=cut, pool=pool)
    sizes = {"num_classes": 5, "dim": 16, "depth": 3, "heads": 2}
    image = vit(image_size=8, patch_size=4, tokenizer=NONE, pool=pool, norm="before_pool", **sizes).eval()
    state = net.state_dict()
    state["vit.patch_embed.proj.weight"] = state["vit.patch_embed.proj.weight"][:, :, 0]
    image.load_state_dict(state)
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(net(images), image(images))


@torch.no_grad()
@pytest.mark.parametrize("model", MODELS)
def test_every_model_depends_on_the_order_of_the_frames(model: Model) -> None:
    net = build(model)
    assert not torch.allclose(net(clips()), net(clips().flip(2)), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("model", MODELS)
def test_a_clip_has_the_same_logits_alone_and_in_a_batch(model: Model) -> None:
    net = build(model)
    torch.testing.assert_close(torch.cat([net(clip) for clip in clips(3).split(1)]), net(clips(3)))


@torch.no_grad()
@pytest.mark.parametrize("model", MODELS)
def test_only_the_sampled_frames_are_used(model: Model) -> None:
    cut = Tubelets(clip_frames=8, image_size=8, frames=1, height=4, width=4, sampled_frames=2)
    net, clip = build(model, tubelets=cut), clips(1, cut)
    other = torch.randn_like(clip)
    other[:, :, [3, 5]] = clip[:, :, [3, 5]]
    assert torch.equal(net(clip), net(other))
    assert not torch.equal(net(clip), net(torch.randn_like(clip)))


@torch.no_grad()
def test_without_temporal_blocks_model_2_is_the_mean_over_time_steps() -> None:
    net = build("factorised_encoder", temporal_depth=0)
    tokens = net.encoder(net.embed(clips()))
    each = ViT.classify(net, tokens)
    torch.testing.assert_close(net(clips()), each.reshape(2, 3, 5).mean(dim=1))
    assert not any(name.startswith("temporal.") for name in net.state_dict())


def test_settings_reach_both_encoders_of_model_2() -> None:
    net = build("factorised_encoder", options={"drop_path_rate": 0.2, "drop_rate": 0.3, "patch_drop_rate": 0.5})
    assert isinstance(net, FactorisedEncoder)
    assert net.temporal is not None
    for encoder, rates in ((net.encoder, [0.0, 0.1, 0.2]), (net.temporal.encoder, [0.0, 0.2])):
        found = [getattr(block.drop_path1, "drop_prob", 0.0) for block in encoder.blocks]
        assert found == pytest.approx(rates)
    assert (net.vit.head_drop.p, net.temporal.vit.head_drop.p) == (0.0, 0.3)
    assert isinstance(net.temporal.vit.patch_drop, nn.Identity)  # no time step is dropped
    assert net.train().embed(clips()).x.shape == (6, 1 + 3, 16)
    assert net(clips()).shape == (2, 5)


@torch.no_grad()
def test_layer_scale_does_not_keep_the_clip_from_the_second_class_token_of_model_2() -> None:
    net = build("factorised_encoder", pool="token", options={"init_values": 1e-5})
    assert isinstance(net, FactorisedEncoder)
    assert net.temporal is not None
    scaled = [name for name, _ in net.named_parameters() if name.endswith("gamma")]
    assert len(scaled) == 2 * SIZES["depth"]
    assert all(name.startswith("encoder.") for name in scaled)
    first, second = net.temporal(torch.randn(2, 16, 3, 1))
    assert (first - second).abs().max() > 1e-2, "the class token does not see the clip"


@pytest.mark.parametrize("model", MODELS)
def test_gradients_reach_every_parameter(model: Model) -> None:
    net = build(model, tokenizer={"at": 1, "build": partial(TokenLearner, num_tokens=2)})
    net.train()(clips()).square().sum().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]


@torch.no_grad()
@pytest.mark.parametrize("model", MODELS)
def test_half_precision_and_autocast(model: Model) -> None:
    net = build(model, tokenizer={"at": 1, "build": partial(TokenLearnerV11, num_tokens=2)})
    exact = net(clips())
    with torch.autocast("cpu", torch.bfloat16):
        logits, records = net(clips()), net.trace(clips())
    assert {tokens.x.dtype for tokens in records} == {torch.float32}
    assert (logits.float() - exact).abs().max() < 0.05 * exact.abs().max() + 0.02
    rough = net.bfloat16()(clips().bfloat16())
    assert (rough.float() - exact).abs().max() < 0.05 * exact.abs().max() + 0.02


# --- tokenizers


def record(model: Model, build_tokenizer: Callable, **changes: Any) -> Tokens:
    """Return the tokens after the first of three blocks, which is the one with the tokenizer."""
    return build(model, tokenizer={"at": 0, "build": build_tokenizer}, **changes).trace(clips())[0]


@torch.no_grad()
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("learner", [TokenLearner, TokenLearnerV11, PatchMerger], ids=lambda t: t.__name__)
def test_token_learner_makes_s_tokens_per_time_step(model: Model, learner: type) -> None:
    tokens = record(model, partial(learner, num_tokens=2))
    joint = model != "factorised_encoder"
    assert tokens.num_patches == (6 if joint else 2)
    assert tokens.frames == (3 if joint else 1)
    assert tokens.origin is not None
    if joint:  # a token has a share only in patches of its own time step
        own = torch.block_diag(*[torch.ones(2, 6)] * 3).bool()
        assert tokens.origin[:, ~own].abs().max() == 0
        assert tokens.origin[:, own].min() > 0
    counts = tokens_per_block(build(model, tokenizer={"at": 1, "build": partial(learner, num_tokens=2)}), clips())
    token = {"spatio_temporal": 1, "factorised_encoder": 3}.get(model, 0)  # model 2: one per time step
    assert counts == [18 + token, 6 + token, 6 + token]


@torch.no_grad()
@pytest.mark.parametrize("model", MODELS)
def test_a_fuser_restores_the_grid_of_every_time_step(model: Model) -> None:
    inner = partial(TokenLearnerV11, num_tokens=2)
    net = build(model, tokenizer={"at": "1:", "build": partial(TokenFuser, inner=inner)})
    out = net.encoder(net.embed(clips()))
    assert (out.num_patches * len(out.x), out.grid) == (2 * 18, (2, 3))
    assert net(clips()).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("model", OVER_TIME)
@pytest.mark.parametrize(
    "kept", [partial(FixedPattern, keep_rate=0.5), partial(Pool, window=(1, 3))], ids=["fixed", "pool"]
)
def test_the_same_reduction_in_every_time_step_allows_attention_over_time(model: Model, kept: Callable) -> None:
    tokens = record(model, kept)
    assert (tokens.frames, tokens.num_patches) == (3, 3 * 2)  # fixed: the complete inner ring of 2 x 3 patches


DROPPING = {
    "ats": partial(ATS, budget=0.5),
    "top_k": partial(TopK, keep_rate=0.5),
    "evit": partial(EViT, keep_rate=0.5),
    "tome": partial(ToMe, r=2),
    "random": partial(RandomDrop, keep_rate=0.5),
}


@torch.no_grad()
@pytest.mark.parametrize("name", DROPPING)
def test_model_1_drops_and_merges_over_space_and_time(name: str) -> None:
    tokens = record("spatio_temporal", DROPPING[name])
    number = {"ats": tokens.num_patches, "tome": 16, "evit": 10}.get(name, 9)
    assert (tokens.num_patches, tokens.frames, tokens.grid) == (number, 1, None)
    assert 1 <= tokens.num_patches < 18
    assert build(tokenizer={"at": "1:", "build": DROPPING[name]})(clips()).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("name", [*DROPPING, "learner"])
def test_model_2_treats_every_time_step_as_a_vit_treats_an_image(name: str) -> None:
    tokenizer = {"at": "1:", "build": {**DROPPING, "learner": partial(TokenLearner, num_tokens=2)}[name]}
    tokenizer["at"] = 1 if name == "learner" else tokenizer["at"]
    cut = Tubelets(clip_frames=3, image_size=(8, 12), frames=1, height=4, width=4)
    net = build("factorised_encoder", tubelets=cut, tokenizer=tokenizer, temporal_depth=0)
    sizes = {"num_classes": 5, "dim": 16, "depth": 3, "heads": 2}
    image = vit(image_size=(8, 12), patch_size=4, tokenizer=tokenizer, **sizes).eval()
    state = net.state_dict()
    state["vit.patch_embed.proj.weight"] = state["vit.patch_embed.proj.weight"][:, :, 0]
    image.load_state_dict(state)
    frames = clips(2, cut).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(net(clips(2, cut)), image(frames).reshape(2, 3, 5).mean(dim=1))


@torch.no_grad()
@pytest.mark.parametrize("model", MODELS[:2])
@pytest.mark.parametrize(
    "all_kept",
    [partial(ATS, budget="all"), partial(TopK, keep_rate=1.0), partial(EViT, keep_rate=1.0), partial(ToMe, r=0)],
)
def test_keeping_all_tokens_is_the_plain_model(model: Model, all_kept: Callable) -> None:
    assert torch.equal(build(model, tokenizer={"at": "0:", "build": all_kept})(clips()), build(model)(clips()))


@pytest.mark.parametrize("model", OVER_TIME)
@pytest.mark.parametrize("name", ["tome", "random"])
def test_methods_that_drop_single_tokens_are_an_error_with_attention_over_time(model: Model, name: str) -> None:
    kind = {"tome": "ToMe", "random": "RandomDrop"}[name]
    said = (
        rf"^Attention over time needs the same tokens in every time step, but {kind} drops or merges tokens one by "
        r"one\. Set backbone\.model=spatio_temporal or factorised_encoder, or use a tokenizer that keeps the time steps"
    )
    with pytest.raises(FewtokensError, match=said):
        build(model, tokenizer={"at": 1, "build": DROPPING[name]})


@pytest.mark.parametrize("model", OVER_TIME)
@pytest.mark.parametrize("name", ["ats", "top_k", "evit"])
def test_methods_that_need_a_class_token_are_an_error_without_one(model: Model, name: str) -> None:
    with pytest.raises(FewtokensError, match="class token"):
        build(model, tokenizer={"at": 1, "build": DROPPING[name]})


# --- errors


@pytest.mark.parametrize("model", OVER_TIME)
@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"pool": "token"}, "class_token=True"),
        ({"pool": "avg", "options": {"class_token": True}}, "class_token=True"),
        ({"options": {"reg_tokens": 2}}, "reg_tokens=2"),
        ({"options": {"patch_drop_rate": 0.5}}, r"patch_drop_rate=0\.5"),
    ],
)
def test_tokens_without_a_position_are_an_error_with_attention_over_time(
    model: Model, changes: dict[str, Any], found: str
) -> None:
    said = (
        rf"^backbone\.model={model} attends over the time steps of every position, so it can have no class or register "
        rf"token and no patch dropout, got {found}\. Set backbone\.pool=avg, or backbone\.model="
    )
    with pytest.raises(FewtokensError, match=said):
        build(model, **changes)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "model_1"}, r"`backbone\.model` must be 'spatio_temporal' or .*, got 'model_1'\."),
        ({"heads": 3}, r"`backbone\.heads` must be a divisor of backbone\.dim=16, got 3\.$"),
        ({"depth": 0}, r"`backbone\.depth` must be an int >= 1, got 0\.$"),
        ({"options": {"mlp_rato": 2}}, r"`backbone\.options` must be arguments of timm's .*'mlp_rato': 2"),
        ({"options": {"dynamic_img_size": True}}, r"`backbone\.options` .*: clips have a fixed size"),
        ({"options": {"embed_dim": 8}}, r"`backbone\.options` .*'embed_dim': 8\}"),
        ({"pool": "median"}, r"`backbone\.options` .*'median'"),
        ({"norm": "after"}, r"`backbone\.norm` must be 'before_pool', 'after_pool' or null, got 'after'\.$"),
        (
            {"model": "factorised_dot_product", "heads": 1},
            r"`backbone\.heads` must be even, since half attend over time, got 1\.$",
        ),
    ],
)
def test_invalid_settings_are_an_error(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(FewtokensError, match=f"(?s)^{said}"):
        build(**changes)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "shape", [(2, 3, 4, 8, 12), (2, 6, 3, 8, 12), (2, 3, 6, 8, 8), (2, 3, 8, 12), (3, 6, 8, 12)], ids=str
)
def test_clips_of_another_size_are_an_error(shape: tuple[int, ...]) -> None:
    said = (
        r"^The model was built for clips \(batch, channels, frames, height, width\) = \(B, 3, 6, 8, 12\), got "
        rf"{re.escape(str(shape))}\. Set data\.frames, data\.image_size and data\.channels to those of the data\.$"
    )
    with pytest.raises(FewtokensError, match=said):
        build()(torch.randn(shape))


# --- learning


def moving_bars(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return clips of a bar that moves right (1) or left (0), which no single frame shows, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(2, (count,), generator=generator)
    columns = torch.randint(5, (count, 1), generator=generator) + torch.arange(4)
    columns = torch.where(target[:, None] == 1, columns, columns.flip(1))
    return 4 * nn.functional.one_hot(columns, 8).float()[:, None, :, None].expand(-1, -1, -1, 8, -1) - 0.5, target


@pytest.mark.parametrize("model", MODELS)
def test_every_model_learns_the_direction_of_motion(model: Model) -> None:
    cut = Tubelets(clip_frames=4, image_size=8, channels=1, frames=2, height=8, width=2)
    tokenizer = {"at": 1, "build": partial(TokenLearnerV11, num_tokens=4)}
    net = build(model, tubelets=cut, num_classes=2, depth=2, temporal_depth=1, tokenizer=tokenizer)
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    for step in range(120):
        x, target = moving_bars(32, step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net.train()(x), target).backward()
        optimizer.step()
    x, target = moving_bars(200, 1000)
    with torch.no_grad():
        assert (net.eval()(x).argmax(dim=1) == target).float().mean() > 0.95
        assert (net(x.flip(2)).argmax(dim=1) == 1 - target).float().mean() > 0.95
