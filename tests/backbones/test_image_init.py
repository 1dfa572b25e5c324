"""Initialization of video models from image models: when they equal the image model at first, and the errors."""

import re
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jaxtyping
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from fewtokens.backbones.image_init import FromImage, init_from_image
from fewtokens.backbones.vit import ViT, vit
from fewtokens.backbones.vivit import Model, ViViT, vivit
from fewtokens.errors import FewtokensError
from fewtokens.layers.embedding import Tubelets
from fewtokens.tokenizers.base import Tokenizer
from fewtokens.tokenizers.token_learner import TokenLearnerV11

NONE = {"at": [], "build": Tokenizer}
SIZES: dict[str, Any] = {"num_classes": 5, "dim": 16, "depth": 2, "heads": 2}
SIDES = (8, 12)
KERNELS = ["central_frame", "filter_inflation"]


def random(model: Any) -> Any:
    """Return the model with all parameters random, and the weights of norms near one."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.3)
    return model.eval()


def image_model(pool: str = "token", **changes: Any) -> ViT:
    settings = {"image_size": SIDES, "patch_size": 4, "tokenizer": NONE, "pool": pool, "norm": "before_pool"}
    return random(vit(**{**settings, **SIZES, **changes}))


def video_model(model: Model = "spatio_temporal", frames: int = 6, tubelet: int = 2, **changes: Any) -> ViViT:
    cut = {"clip_frames": frames, "image_size": SIDES, "frames": tubelet, "height": 4, "width": 4}
    cut |= changes.pop("cut", {})
    return random(vivit(tubelets=Tubelets(**cut), tokenizer=NONE, model=model, **{**SIZES, **changes}))


def clips(frames: int = 6) -> Tensor:
    return torch.randn(2, 3, frames, *SIDES, generator=torch.Generator().manual_seed(0))


def still(frames: int) -> Tensor:
    return clips(1).expand(-1, -1, frames, -1, -1)


close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable pytest's type checks, which would reject wrong settings before our own checks do."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


# --- models that equal the image model at first


@torch.no_grad()
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("tubelet", [1, 2, 3])
def test_model_1_equals_the_image_model_on_a_still_clip_of_one_tubelet(kernel: str, pool: str, tubelet: int) -> None:
    image, video = image_model(pool), video_model(frames=tubelet, tubelet=tubelet, pool=pool)
    init_from_image(video, image.state_dict(), kernel=kernel)
    close(video(still(tubelet)), image(still(1)[:, :, 0]))


@torch.no_grad()
@pytest.mark.parametrize("kernel", KERNELS)
def test_model_1_with_mean_pooling_equals_the_image_model_on_any_still_clip(kernel: str) -> None:
    image, video = image_model("avg"), video_model(pool="avg")
    init_from_image(video, image.state_dict(), kernel=kernel)
    close(video(still(6)), image(still(1)[:, :, 0]))


@torch.no_grad()
def test_model_1_with_a_class_token_is_not_the_image_model_over_several_steps() -> None:
    """The patches are repeated and outweigh the class token's own key, as the docstring says."""
    image, video = image_model(), video_model()
    init_from_image(video, image.state_dict())
    assert (video(still(6)) - image(still(1)[:, :, 0])).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("tubelet", [1, 2, 3])
@pytest.mark.parametrize(
    ("model", "pool"),
    [
        ("factorised_self_attention", "avg"),
        ("factorised_self_attention_time_space", "avg"),
        ("factorised_encoder", "avg"),
        ("factorised_encoder", "token"),
    ],
)
def test_models_2_and_3_are_the_mean_over_the_central_frames(model: Model, pool: str, tubelet: int) -> None:
    image, video = image_model(pool), video_model(model, tubelet=tubelet, pool=pool, temporal_depth=0)
    init_from_image(video, image.state_dict())
    frames = clips()[:, :, tubelet // 2 :: tubelet].transpose(1, 2)
    close(video(clips()), torch.stack([image(clip) for clip in frames]).mean(dim=1))


@torch.no_grad()
def test_filter_inflation_is_the_image_model_on_the_mean_of_the_frames() -> None:
    image, video = image_model("avg"), video_model("factorised_self_attention", tubelet=3)
    init_from_image(video, image.state_dict(), kernel="filter_inflation")
    frames = clips().unflatten(2, (2, 3)).mean(dim=3).transpose(1, 2)
    close(video(clips()), torch.stack([image(clip) for clip in frames]).mean(dim=1))


@torch.no_grad()
@pytest.mark.parametrize("model", ["factorised_dot_product", "factorised_encoder"])
def test_models_that_are_not_the_image_model_at_first(model: Model) -> None:
    """In model 4 half of the heads attend to one position only; model 2's temporal encoder is random."""
    image, video = image_model("avg"), video_model(model, pool="avg")
    init_from_image(video, image.state_dict())
    assert (video(still(6)) - image(still(1)[:, :, 0])).abs().max() > 1e-3


def test_temporal_attention_adds_nothing_at_first_and_learns() -> None:
    video = video_model("factorised_self_attention")
    init_from_image(video, image_model("avg").state_dict())
    block: Any = video.encoder.blocks[0]
    for source, twin in ((block.attn.qkv, block.attn_time.qkv), (block.norm1, block.norm_time)):
        assert torch.equal(source.weight, twin.weight)
        assert torch.equal(source.bias, twin.bias)
    assert block.attn_time.proj.weight.abs().max() == block.attn_time.proj.bias.abs().max() == 0
    optimizer = torch.optim.SGD(video.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        video(clips()).square().sum().backward()
        optimizer.step()
    gradients = {name: p.grad for name, p in video.named_parameters() if "_time." in name}
    assert all(g is not None and g.abs().sum() > 0 for g in gradients.values())


# --- names and shapes


@torch.no_grad()
@pytest.mark.parametrize("model", get_args(Model))
def test_every_model_reports_the_parameters_that_stay_random(model: Model) -> None:
    for pool in ("token", "avg"):
        video = video_model(model)
        before = {name: value.clone() for name, value in video.state_dict().items()}
        started = init_from_image(video, image_model(pool).state_dict())
        assert not set(started.loaded) & set(started.missing)
        assert set(started.loaded) | set(started.missing) == set(before)
        assert all(torch.equal(before[name], video.state_dict()[name]) for name in started.missing)
        over_time = model not in ("spatio_temporal", "factorised_encoder")
        assert started.unexpected == (["vit.cls_token"] if over_time and pool == "token" else [])
        new = {name.split(".")[1] for name in started.missing if not name.startswith("temporal.")}
        assert new == ({"cls_token"} if not over_time and pool == "avg" else set())
        assert any(n.startswith("temporal.encoder") for n in started.missing) == (model == "factorised_encoder")
        assert any(name.endswith("head.weight") for name in started.loaded)
        assert f"{len(started.loaded)} tensors loaded from the image model; random: " in str(started)
        assert f"; unused: {', '.join(started.unexpected) or 'none'}" in str(started)


@torch.no_grad()
def test_model_2_gets_the_class_token() -> None:
    image, video = image_model(), video_model("factorised_encoder")
    init_from_image(video, image.state_dict())
    assert torch.equal(video.vit.cls_token, image.vit.cls_token)
    assert torch.equal(video.vit.pos_embed, image.vit.pos_embed)
    assert torch.equal(video.temporal.vit.head.weight, image.vit.head.weight)


@torch.no_grad()
def test_positions_are_tiled_and_the_class_token_keeps_its_own() -> None:
    image, video = image_model(), video_model()
    init_from_image(video, image.state_dict())
    table, tiled = image.vit.pos_embed[0], video.vit.pos_embed[0]
    assert torch.equal(tiled[0], table[0])
    assert torch.equal(tiled[1:].reshape(3, 6, 16), table[1:].expand(3, -1, -1))


@torch.no_grad()
@pytest.mark.parametrize(("size", "grid"), [(16, None), ((4, 12), (1, 3))])
def test_positions_of_another_grid_are_resampled_as_timm_does(size: Any, grid: tuple[int, int] | None) -> None:
    image, video = image_model(image_size=size), video_model()
    init_from_image(video, image.state_dict(), positions="resize", grid=grid)
    old = grid or (4, 4)
    expected = resample_abs_pos_embed(image.vit.pos_embed, [2, 3], list(old), num_prefix_tokens=1)[0]
    assert torch.equal(video.vit.pos_embed[0, :1], expected[:1])
    close(video.vit.pos_embed[0, 1:].reshape(3, 6, 16), expected[1:].expand(3, -1, -1))


@torch.no_grad()
def test_a_head_of_another_size_stays_random() -> None:
    video = video_model()
    started = init_from_image(video, image_model(num_classes=7).state_dict())
    heads = ["vit.head.bias", "vit.head.weight"]
    assert started.missing == started.unexpected == heads


@torch.no_grad()
def test_a_norm_after_the_pooling_becomes_the_one_before_it() -> None:
    image = image_model("avg", norm="after_pool")
    video = video_model("factorised_self_attention")
    assert not init_from_image(video, image.state_dict()).missing
    assert torch.equal(video.vit.norm.weight, image.vit.fc_norm.weight)
    other = video_model("factorised_self_attention", norm="after_pool")
    init_from_image(other, image.state_dict())
    assert torch.equal(other.vit.fc_norm.bias, image.vit.fc_norm.bias)


@torch.no_grad()
def test_tokenizers_of_the_same_shapes_are_loaded() -> None:
    learner = {"at": 1, "build": partial(TokenLearnerV11, num_tokens=2)}
    image = image_model(tokenizer=learner)
    started = init_from_image(video_model(), image.state_dict())
    assert all(name.startswith("encoder.layers.1.tokenizer.") for name in started.unexpected)
    video = random(vivit(tubelets=Tubelets(6, SIDES, frames=2, height=4, width=4), tokenizer=learner, **SIZES))
    started = init_from_image(video, image.state_dict())
    assert started.missing == started.unexpected == []


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_base_patch16_gap_224"]
)
def test_weights_in_timms_names(name: str) -> None:
    reference = random(timm.create_model(name, img_size=32, num_classes=5, depth=2, embed_dim=16, num_heads=2))
    cut = Tubelets(clip_frames=2, image_size=32, frames=2, height=16, width=16)
    pool = "avg" if "gap" in name else "token"
    video = random(vivit(tubelets=cut, tokenizer=NONE, pool=pool, **SIZES))
    started = init_from_image(video, reference.state_dict())
    images = torch.randn(2, 3, 32, 32)
    if "distilled" in name:
        extra = ["vit.dist_token", "vit.head_dist.bias", "vit.head_dist.weight"]
        assert (started.missing, started.unexpected) == ([], extra)
        assert torch.equal(video.vit.pos_embed[0], reference.pos_embed[0, [0, 2, 3, 4, 5]])
    else:
        assert started.missing == started.unexpected == []
        close(video(images[:, :, None].expand(-1, -1, 2, -1, -1)), reference(images))


@torch.no_grad()
def test_the_same_number_of_register_tokens_is_loaded() -> None:
    image, video = image_model(options={"reg_tokens": 2}), video_model(options={"reg_tokens": 2})
    assert not init_from_image(video, image.state_dict()).missing
    assert torch.equal(video.vit.pos_embed[0, :3], image.vit.pos_embed[0, :3])
    fewer = video_model(options={"reg_tokens": 1})
    before = fewer.vit.pos_embed[0, 1].clone()
    assert init_from_image(fewer, image.state_dict()).missing == ["vit.reg_token"]
    assert torch.equal(fewer.vit.pos_embed[0, :2], torch.stack([image.vit.pos_embed[0, 0], before]))


# --- from files


@torch.no_grad()
def test_a_run_a_checkpoint_or_a_file_of_weights(tmp_path: Path) -> None:
    image = image_model()
    metrics = {"train_loss.mean_value": torch.zeros(())}
    content = {"state_dict": {f"model.{k}": v for k, v in image.state_dict().items()} | metrics, "epoch": 3}
    (tmp_path / "checkpoints").mkdir()
    torch.save(content, tmp_path / "checkpoints" / "last.ckpt")
    save_file(image.state_dict(), tmp_path / "weights.safetensors")
    expected = video_model()
    init_from_image(expected, image.state_dict())
    for path in (tmp_path, tmp_path / "checkpoints" / "last.ckpt", tmp_path / "weights.safetensors"):
        video = video_model()
        assert FromImage(str(path))(video).unexpected == []
        assert torch.equal(video(clips()), expected(clips()))
    torch.save({"state_dict": random(image).state_dict()}, tmp_path / "checkpoints" / "best.ckpt")
    assert FromImage(str(tmp_path), positions="resize", grid=[2, 3])(video).missing == []


def test_a_name_of_timm_downloads_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    original, asked = timm.create_model, []

    def create(name: str, pretrained: bool = False, **settings: Any) -> Any:
        asked.append(pretrained)
        return original(name, pretrained=False, **settings)

    monkeypatch.setattr(timm, "create_model", create)
    cut = Tubelets(clip_frames=2, image_size=32, frames=2, height=16, width=16)
    video = vivit(tubelets=cut, tokenizer=NONE, num_classes=5, dim=192, depth=12, heads=3)
    started = FromImage("timm:vit_tiny_patch16_224.augreg_in21k")(video)
    assert started.missing == ["vit.head.bias", "vit.head.weight"]
    assert True in asked


# --- errors


def changed(**changes: Any) -> dict[str, Tensor]:
    return image_model(**changes).state_dict()


@torch.no_grad()
@pytest.mark.parametrize(
    ("state", "said"),
    [
        (partial(changed, dim=32), r"of another shape \['vit\.pos_embed', .* and 29 in all"),
        (partial(changed, depth=3), r"unexpected \['encoder\.layers\.2\.block\."),
        (partial(changed, depth=1), r"missing \['encoder\.layers\.1\.block\."),
        (partial(changed, patch_size=2, image_size=(4, 6)), r"of another shape \['vit\.patch_embed\.proj\.weight'\]"),
        (partial(changed, channels=1), r"of another shape \['vit\.patch_embed\.proj\.weight'\]"),
        (partial(changed, options={"init_values": 0.1}), r"unexpected \['encoder\.layers\.0\.block\.ls1\.gamma'"),
        (partial(changed, options={"qk_norm": True}), r"unexpected \['encoder\.layers\.0\.block\.attn\.k_norm"),
        (partial(changed, options={"pos_embed": "none"}), r"missing \['vit\.pos_embed'\]"),
        (dict, r"missing \['encoder\.layers\.0\.block"),
        (lambda: timm.create_model("resnet18").state_dict(), r"unexpected \['vit\.bn1"),
        (
            lambda: video_model().state_dict(),
            r"^`init_image\.weights` must be the weights of an image model, .*, got \(16, 3, 2, 4, 4\)\. Continue a",
        ),
        (
            partial(changed, image_size=16),
            r"^The image model has a grid of 4x4 patches and the video model one of 2x3\. Set .*positions=resize",
        ),
        (
            partial(changed, image_size=(4, 28)),
            r"^The image model has 8 positions, 1 of them for class .* do not form a grid of \[2, 3\] or a square",
        ),
        (
            partial(changed, options={"no_embed_class": True}),
            r"^The class token has a position in only one .* 6 positions .*Set backbone\.options\.no_embed_class=true",
        ),
    ],
)
def test_image_models_that_do_not_fit_are_an_error_and_nothing_changes(state: Any, said: str) -> None:
    for model in ("spatio_temporal", "factorised_encoder"):
        video = video_model(model)
        before = {name: value.clone() for name, value in video.state_dict().items()}
        with pytest.raises(FewtokensError, match=said):
            init_from_image(video, state())
        assert all(torch.equal(value, before[name]) for name, value in video.state_dict().items())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"kernel": "average"},
            r"^`init_image\.kernel` must be 'central_frame' or 'filter_inflation', got 'average'\.",
        ),
        ({"positions": "stretch"}, r"^`init_image\.positions` must be 'tile' or 'resize', got 'stretch'\."),
        (
            {"grid": (3, 3)},
            r"^The image model has 7 positions, 1 of them .*do not form the grid \[3, 3\]\. Set init_image\.grid=",
        ),
    ],
)
def test_invalid_settings_are_an_error(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(FewtokensError, match=said):
        init_from_image(video_model(), image_model().state_dict(), **settings)


def test_missing_weights_and_image_models_are_an_error(tmp_path: Path) -> None:
    for weights in (tmp_path / "none.ckpt", tmp_path):
        said = rf"^`init_image\.weights` must be a run directory .*, got {re.escape(repr(str(weights)))}\.$"
        with pytest.raises(FewtokensError, match=said):
            FromImage(str(weights))(video_model())
    said = (
        r"^init_image starts a video model, but the backbone is a ViT\. Set backbone=vivit_base, or init_image=none\.$"
    )
    with pytest.raises(FewtokensError, match=said):
        FromImage("weights.pth")(image_model())
