"""The gallery draws what methods leave of photographs, and counts it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from conftest import CONFIGS, TINY
from fewtokens.analysis.pictures.sheet import GAP, MARGIN
from fewtokens.benchmarks import gallery
from fewtokens.benchmarks.variants import compose_with
from fewtokens.errors import FewtokensError
from fewtokens.runs import train as training

SMALL = ["backbone=vit_mini", "backbone.patch_size=4", "backbone.pool=token", "data.image_size=32", "width=64"]
METHODS = "methods=[ats,'tome build.r=10',top_k]"


@pytest.fixture
def draw(composed):
    def run(*overrides: str) -> dict:
        cfg = composed(*overrides, base="gallery")
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):  # it composes one config more for every method
            return gallery.run(cfg)

    return run


def photograph(path: Path, size: tuple[int, int] = (90, 60)) -> Path:
    y, x = np.mgrid[: size[1], : size[0]]
    Image.fromarray(np.stack([x * 2, y * 3, x + y], axis=2).astype(np.uint8)).save(path)
    return path


def test_a_row_per_method_and_a_record_of_what_it_keeps(draw, tmp_path: Path) -> None:
    found = draw(*SMALL, METHODS, "blocks=[0,3]")
    output = tmp_path / "run" / "gallery.png"
    assert json.loads(output.with_suffix(".json").read_text()) == found
    assert {output.name, "gallery.json", "config.yaml"} == {path.name for path in output.parent.iterdir()}
    assert list(found["images"]) == ["china.jpg", "flower.jpg"], "without images, those of scikit-learn"
    assert [record["method"] for record in found["methods"]] == ["ats", "tome build.r=10", "top_k"]
    _, tome, top_k = found["methods"]
    assert tome["patch_tokens"] == {"0": [54, 54], "3": [24, 24]}
    assert top_k["patch_tokens"] == {"0": [64, 64], "3": [23, 23]}
    for record in found["methods"]:
        assert record["gmacs"] == pytest.approx([share * found["gmacs_dense"] for share in record["share_of_dense"]])
        assert all(0.2 < share <= 1 for share in record["share_of_dense"])
    assert found["commit"] is None or len(found["commit"]) >= 40
    pixels = np.asarray(Image.open(output))
    photographs = pixels[MARGIN : MARGIN + 64]
    columns = np.nonzero((photographs < 250).any(axis=(0, 2)))[0]
    assert pixels.shape[0] > 64 + 3 * (64 + GAP)
    assert columns.min() > MARGIN, "labels to the left"
    assert columns.max() < pixels.shape[1] - MARGIN


def test_pictures_of_any_size_and_kind(draw, tmp_path: Path) -> None:
    wide, tall = photograph(tmp_path / "wide.png"), photograph(tmp_path / "tall.png", (40, 300))
    Image.open(tall).convert("L").save(tall)
    out = tmp_path / "other" / "picture.png"
    found = draw(
        *SMALL, "methods=[pool]", f"images=[{wide},{tall}]", f"output={out}", "data=digits", "data.image_size=32"
    )
    assert list(found["images"]) == ["wide.png", "tall.png"]
    assert out.is_file()
    assert out.with_suffix(".json").is_file()


def test_the_middle_of_a_photograph_reaches_the_model(make, tmp_path: Path) -> None:
    path = photograph(tmp_path / "a.png")
    images = gallery.load_photographs([path], make(size=(30, 30)))
    whole = np.asarray(Image.open(path))[:, 15:75]
    assert images.shape == (1, 3, 30, 30)
    assert np.abs(images[0].permute(1, 2, 0).numpy().astype(int) - whole[::2, ::2]).max() < 8
    assert gallery.load_photographs([path], make(channels=1)).shape == (1, 1, 8, 12)


def test_trained_tokenizers_are_drawn_from_their_run_and_otherwise_left_out(draw, composed, tmp_path, caplog) -> None:
    skipped = draw(*SMALL, "methods=[token_learner,pool]")["methods"]
    assert skipped[0] == {"method": "token_learner", "skipped": "its parameters are not in the weights"}
    assert "token_learner is left out" in caplog.text
    training.run(composed(*TINY, "tokenizer.build.num_tokens=3", "test=false", directory="trained"))
    found = draw(f"checkpoint={tmp_path / 'trained'}", "methods=[run,'token_learner at=1',tome]", "width=48")
    assert [record["method"] for record in found["methods"]] == ["run", "token_learner at=1", "tome"]
    assert found["methods"][0]["patch_tokens"]["1"] == [3, 3]
    assert "skipped" in found["methods"][1], "8 tokens do not fit the parameters for 3"
    assert found["backbone"] == "vit"


def test_weights_of_a_file_are_those_of_every_method(draw, tmp_path: Path, monkeypatch) -> None:
    names = ["backbone=timm", "backbone.name=vit_tiny_patch16_224", "+backbone.options.depth=2", "data.image_size=32"]
    cfg = OmegaConf.create({"build": {"_target_": "fewtokens.tokenizers.base.Tokenizer", "_partial_": True}, "at": []})
    model = gallery.instantiate(
        {
            "_target_": "fewtokens.backbones.pretrained.timm_vit",
            "name": "vit_tiny_patch16_224",
            "image_size": 32,
            "num_classes": 3,
            "options": {"depth": 2},
            "tokenizer": cfg,
        }
    )
    state = {name.removeprefix("vit."): value for name, value in model.vit.state_dict(prefix="vit.").items()}
    state |= {
        f"blocks.{i}.{n}": v for i, block in enumerate(model.encoder.blocks) for n, v in block.state_dict().items()
    }
    torch.save(state, tmp_path / "weights.pt")
    seen = []
    monkeypatch.setattr(
        gallery, "reduced", lambda model, *rest, original=gallery.reduced: seen.append(model) or original(model, *rest)
    )
    found = draw(
        *names, "methods=['top_k at=1',tome]", f"backbone.weights={tmp_path / 'weights.pt'}", "blocks=[1]", "width=32"
    )
    assert list(found["weights"]) == ["weights.pt"]
    for variant in seen:
        weight = variant.encoder.blocks[1].attn.qkv.weight
        assert torch.equal(weight, model.encoder.blocks[1].attn.qkv.weight)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("methods=ats", "`methods` must be a list"),
        ("methods=[]", "`methods` must be a list"),
        ("methods=[token_learner]", "a method whose parameters the weights hold"),
        ("methods=['tome build.rr=3']", "Did you mean build.r?"),
        ("blocks=[9]", "`blocks` must be a block index from 0 to 3"),
        ("images=a.png", "`images` must be a list of paths"),
        ("images=[missing.png]", "Cannot read the picture missing.png"),
        ("width=3", "`width` must be an int >= 32"),
        ("output=a.jpg", "`output` must be a path that ends in .png"),
    ],
)
def test_errors_are_sentences(draw, wrong: str, says: str) -> None:
    with pytest.raises(FewtokensError, match=says.replace("?", r"\?")):
        draw(*SMALL, wrong)


def test_clips_are_refused(draw) -> None:
    with pytest.raises(FewtokensError, match="`backbone` must be a model of images"):
        draw("backbone=vivit_mini", "data=moving_digits", "methods=[tome]")


@pytest.mark.parametrize("entry", ["", "tome 'build.r=3"])
def test_an_entry_that_names_no_option(entry: str) -> None:
    with pytest.raises(FewtokensError, match=r"`methods` must name options of configs/tokenizer, got"):
        compose_with(entry, "methods")


def test_weights_of_other_frameworks_are_described(composed, tmp_path: Path) -> None:
    (tmp_path / "w.npz").write_bytes(b"x")
    cfg = composed("backbone=vit_mini", f"backbone.weights=scenic:{tmp_path}/w.npz", base="gallery")
    assert list(gallery._origin(cfg, [])["weights"]) == ["w.npz"]
