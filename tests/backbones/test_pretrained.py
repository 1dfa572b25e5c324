"""timm's models around our encoder: bitwise equal logits, weights from files, and errors."""

import logging
import pickle
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor, nn

from fewtokens.backbones import pretrained
from fewtokens.backbones.pretrained import timm_vit
from fewtokens.backbones.vit import ViT
from fewtokens.errors import FewtokensError
from fewtokens.tokenizers.base import Tokenizer

NONE = {"at": 0, "build": Tokenizer}
TINY = "vit_tiny_patch16_224"
SHALLOW = {"depth": 2}


def theirs(name: str = TINY, size: int = 32, classes: int = 5, **options: Any) -> nn.Module:
    """Return timm's own model with all weights random, none of them the initial zeros and ones."""
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=size, num_classes=classes, **{**SHALLOW, **options}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def ours(name: str = TINY, size: int = 32, classes: int = 5, **settings: Any) -> ViT:
    arguments = {"options": SHALLOW, "tokenizer": NONE, **settings}
    return timm_vit(name=name, image_size=size, num_classes=classes, **arguments).eval()


def random_images(size: int, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))


def as_ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    def ours(name: str) -> str:
        block, parameter = name.removeprefix("blocks.").partition(".")[::2]
        return f"encoder.layers.{block}.block.{parameter}" if name.startswith("blocks.") else f"vit.{name}"

    return {ours(name): value for name, value in state.items()}


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_tiny_patch16_224", 32),
        ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", 32),
        ("deit_tiny_patch16_224", 32),
        ("deit_tiny_distilled_patch16_224", 32),
        ("deit3_small_patch16_224", 32),
        ("vit_small_patch14_reg4_dinov2", 28),
        ("vit_base_patch32_clip_224", 64),
        ("vit_base_patch32_clip_quickgelu_224", 64),
        ("vit_base_patch16_siglip_224", 32),
        ("vit_base_patch16_gap_224", 32),
        ("vit_base_patch16_reg4_gap_256", 32),
    ],
)
def test_logits_equal_timms_bit_for_bit(name: str, size: int) -> None:
    reference, model = theirs(name, size), ours(name, size)
    model.load_state_dict(as_ours(reference.state_dict()))
    expected = reference(random_images(size))
    assert expected.std() > 1e-3
    assert (model(random_images(size)) - expected).abs().max().item() == 0.0


@torch.no_grad()
def test_other_channels_and_classes() -> None:
    assert ours(classes=7, channels=1)(random_images(32, channels=1)).shape == (2, 7)
    assert ours(classes=0)(random_images(32)).shape == (2, 192)


# --- weights from a file


def saved(state: Any, path: Path) -> str:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return str(path)


@torch.no_grad()
@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", [TINY, "deit_tiny_distilled_patch16_224", "vit_base_patch16_siglip_224"])
def test_weights_from_a_file(name: str, ending: str, tmp_path: Path) -> None:
    reference = theirs(name)
    model = ours(name, weights=saved(reference.state_dict(), tmp_path / f"weights{ending}"))
    assert torch.equal(model(random_images(32)), reference(random_images(32)))


@torch.no_grad()
@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_weights_one_level_down_in_the_file(key: str, tmp_path: Path) -> None:
    reference = theirs()
    model = ours(weights=saved({key: reference.state_dict(), "epoch": 3}, tmp_path / "weights.pth"))
    assert torch.equal(model(random_images(32)), reference(random_images(32)))


@torch.no_grad()
def test_weights_of_another_image_size_are_resampled_as_timm_does(tmp_path: Path) -> None:
    reference = theirs(size=32)
    model = ours(size=48, weights=saved(reference.state_dict(), tmp_path / "weights.pth"))
    reference.set_input_size((48, 48))
    torch.testing.assert_close(model(random_images(48)), reference(random_images(48)))


@torch.no_grad()
@pytest.mark.parametrize(("name", "heads"), [(TINY, 1), ("deit_tiny_distilled_patch16_224", 2)])
def test_a_head_of_another_size_stays_random_with_a_warning(
    name: str, heads: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference = theirs(name, classes=9)
    with caplog.at_level(logging.WARNING):
        model = ours(name, classes=5, weights=saved(reference.state_dict(), tmp_path / "weights.pth"))
    assert len(caplog.messages) == 2 * heads
    assert "head.weight is (9, 192), but the model's is (5, 192); it is initialized at random" in caplog.messages[0]
    features = model.vit.norm(model.encoder(model.embed(random_images(32))).x)
    assert torch.equal(features, reference.forward_features(random_images(32)))
    assert model(random_images(32)).shape == (2, 5)


@torch.no_grad()
def test_a_head_missing_in_the_file_or_in_the_model(tmp_path: Path) -> None:
    reference = theirs()
    expected = reference.forward_features(random_images(32))
    state = reference.state_dict()
    headless = {name: value for name, value in state.items() if not name.startswith("head.")}
    models = [
        ours(weights=saved(headless, tmp_path / "headless.pth")),
        ours(weights=saved(state, tmp_path / "weights.pth"), classes=0),
    ]
    for model in models:
        assert torch.equal(model.vit.norm(model.encoder(model.embed(random_images(32))).x), expected)


@pytest.mark.parametrize(
    ("other", "options", "wrong"),
    [
        (
            "vit_small_patch16_224",
            {},
            r"missing none, unexpected none, of another shape blocks\.0\..* \.\.\. \(30 in all\)",
        ),
        (
            TINY,
            {"depth": 3},
            r"missing none, unexpected blocks\.2\..* \.\.\. \(12 in all\), of another shape none",
        ),
        (TINY, {"depth": 1}, r"missing blocks\.1\..* \.\.\. \(12 in all\), unexpected none, of another shape none"),
        (
            "deit_tiny_distilled_patch16_224",
            {},
            r"missing none, unexpected dist_token, of another shape pos_embed",
        ),
        ("resnet18", None, r"missing blocks\.0\..*unexpected bn1\."),
    ],
)
def test_weights_of_another_model_are_an_error(other: str, options: dict | None, wrong: str, tmp_path: Path) -> None:
    model = timm.create_model(other, num_classes=5) if options is None else theirs(other, **options)
    path = saved(model.state_dict(), tmp_path / "weights.pth")
    said = (
        rf"(?s)weights\.pth does not fit the \d+ parameters of VisionTransformer: .*{wrong}.*\. "
        r"Set backbone\.name to the model that the file was made from\.$"
    )
    with pytest.raises(FewtokensError, match=said):
        ours(weights=path)


class Payload:
    """Code that runs when it is unpickled, as in a malicious file."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("ran"),)


def test_pickled_code_is_an_error_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = saved({"model": Payload()}, tmp_path / "weights.pth")
    said = (
        r"weights\.pth must be a \.safetensors file, or a torch file of tensors that loads with weights_only=True, "
        r"but: UnpicklingError: .*\. Convert it to \.safetensors on a machine where you trust it\.$"
    )
    with pytest.raises(FewtokensError, match=said):
        ours(weights=path)
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
@pytest.mark.parametrize("content", [b"", b"not weights", pickle.dumps({"a": 1})], ids=["empty", "text", "pickle"])
def test_files_that_are_neither_are_an_error(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FewtokensError, match=rf"{name} must be a \.safetensors file, .*, but: \w+: .*\. Convert it"):
        ours(weights=str(tmp_path / name))


@pytest.mark.parametrize("content", [torch.zeros(3), [torch.zeros(3)], {"model": [1]}, {"epoch": 3}], ids=str)
def test_torch_files_of_something_else_are_an_error(content: Any, tmp_path: Path) -> None:
    path = saved(content, tmp_path / "weights.pth")
    said = (
        r"weights\.pth must be a \.safetensors file, .*, but: TypeError: it does not map names to tensors\. Convert it"
    )
    with pytest.raises(FewtokensError, match=said):
        ours(weights=path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.pth", tmp_path):
        said = rf"^There is no file {re.escape(str(path))}\. Set backbone\.weights to a file of weights\.$"
        with pytest.raises(FewtokensError, match=said):
            ours(weights=str(path))


# --- errors


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("resnet18", r"ResNet"),
        ("vit_relpos_small_patch16_224", r"VisionTransformerRelPos"),
        ("vit_small_patch16_18x2_224", r"VisionTransformer with blocks of type ParallelThingsBlock"),
        ("eva02_tiny_patch14_224", r"Eva"),
    ],
)
@pytest.mark.parametrize("options", [{}, SHALLOW], ids=str)
def test_other_families_are_an_error(name: str, kind: str, options: dict[str, int]) -> None:
    said = (
        r"^Tokenizers work in timm's VisionTransformer with its standard blocks \(vit, deit, .*\), but "
        rf"{name} is a {kind}\. Choose another model, such as backbone\.name=deit_small_patch16_224\.$"
    )
    with pytest.raises(FewtokensError, match=said):
        ours(name, options=options)


@pytest.mark.parametrize(
    ("wrong", "near"), [("vit_tiny_patch16_244", TINY), ("deit_tinny_patch16_224", "deit_tiny_patch16")]
)
def test_an_unknown_name_is_an_error_with_a_similar_one(wrong: str, near: str) -> None:
    said = (
        rf"^`backbone\.name` must be the name of a timm model, such as .*{near}.*, got '{wrong}'\. "
        r"List them with: python -c \"import timm; "
    )
    with pytest.raises(FewtokensError, match=said):
        ours(wrong)


def test_a_name_similar_to_none_is_an_error_with_an_example() -> None:
    with pytest.raises(FewtokensError, match=r"such as vit_small_patch16_224, got 'q'\."):
        ours("q")


@pytest.mark.parametrize("changes", [{"options": {"dept": 2}}, {"options": {"num_heads": 7}}], ids=str)
def test_settings_that_timm_does_not_accept_are_an_error(changes: dict[str, Any]) -> None:
    (name,) = changes["options"]
    said = (
        rf"(?s)^timm cannot build {TINY} with \{{.*'{name}': .*\}}: .*\. "
        r"Check data\.image_size, data\.channels and backbone\.options\.$"
    )
    with pytest.raises(FewtokensError, match=said):
        ours(**changes)


@pytest.mark.parametrize(("name", "value"), [("global_pool", "median"), ("qk_norm", "abc"), ("drop_rate", 1.0)])
def test_options_of_the_wrong_type_are_an_error(name: str, value: Any) -> None:
    with pytest.raises(FewtokensError, match=rf"^`backbone\.options\.{name}` must be .*, got {value!r}\.$"):
        ours(options={name: value})


@pytest.mark.parametrize("size", [8, 40])
def test_patches_must_tile_the_image(size: int) -> None:
    """timm itself would build a model without patches, or ignore pixels at the edge."""
    said = rf"^Patches of 16x16 pixels do not tile an image of {size}x{size}\. Set backbone\.patch_size"
    with pytest.raises(FewtokensError, match=said):
        ours(size=size)


def test_without_a_network_the_error_tells_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **settings: Any) -> nn.Module:
        if pretrained:
            raise ConnectionError("no route to host")
        return create(name, **settings)

    monkeypatch.setattr(pretrained.timm, "create_model", offline)
    said = (
        rf"^timm could not download the weights of {TINY}: ConnectionError: no route to host\. Check the pretrained "
        r"tag and the network, or download the file elsewhere and set backbone\.weights="
    )
    with pytest.raises(FewtokensError, match=said):
        ours(pretrained=True)


@pytest.mark.parametrize(
    ("reachable", "proxy", "offline"), [(True, "", False), (False, "", True), (False, "p:80", True)]
)
def test_without_a_network_the_hub_is_not_retried(monkeypatch, reachable: bool, proxy: str, offline: bool) -> None:
    create, seen = timm.create_model, []

    def connect(*_: Any, **__: Any) -> Any:
        if not reachable:
            raise OSError("no network")
        return Mock()

    def record(name: str, pretrained: bool = False, **settings: Any) -> nn.Module:
        seen.append(constants.HF_HUB_OFFLINE)
        return create(name, **settings)

    monkeypatch.setenv("https_proxy", proxy)
    monkeypatch.setattr("socket.create_connection", connect)
    monkeypatch.setattr(pretrained.timm, "create_model", record)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    ours(pretrained=True)
    assert seen[-1] is offline
    assert constants.HF_HUB_OFFLINE is False
