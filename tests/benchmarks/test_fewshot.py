"""The command that compares methods by few-shot transfer."""

import json
from pathlib import Path

import pytest
import torch
from hydra import initialize_config_dir

from conftest import CONFIGS
from fewtokens.analysis import fewshot as measure
from fewtokens.benchmarks import budgets, fewshot
from fewtokens.errors import FewtokensError
from fewtokens.runs.config import instantiate
from small_models import small

SMALL = [
    "data=digits",
    "data.image_size=16",
    "backbone=vit_mini",
    "backbone.patch_size=2",
    "backbone.dim=16",
    "backbone.heads=2",
    "backbone.pool=token",
    "trainer=cpu",
    "counted_images=10",
    "measure.fewshot.shots=[1,3]",
    "measure.fewshot.draws=2",
    "measure.fewshot.test_per_class=3",
]


@pytest.fixture
def compare(composed, tmp_path: Path):
    def run(*overrides: str) -> dict:
        cfg = composed(*SMALL, f"features={tmp_path / 'features'}", *overrides, base="fewshot")
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):  # it composes one config more for every method
            return fewshot.run(cfg)

    return run


@pytest.mark.slow
def test_methods_are_compared_at_equal_cost_and_features_are_kept(compare, tmp_path: Path, monkeypatch) -> None:
    methods, out = "methods=[tome,'top_k build.keep_rate=0.5',sit]", tmp_path / "out" / "digits"
    found = compare(methods, "shares=[0.75,0.5]", f"output={out}", "title=Digits")
    assert json.loads(out.with_name("digits.json").read_text()) == found
    names = [record["name"] for record in found["methods"]]
    assert names == ["dense", "tome", "tome", "top_k"], "SiT has parameters"
    assert found["methods"][3]["method"] == "top_k build.keep_rate=0.5"
    for record, share in zip(found["methods"], [1, 0.75, 0.5, 0.5], strict=True):
        assert record["share"] == pytest.approx(share, abs=0.15 if record["name"] == "top_k" else 0.01)
        assert record["gmacs"] == pytest.approx(record["share"] * found["gmacs_dense"])
    for record in found["methods"]:
        assert {probe: len(values) for probe, values in record["draws"].items()} == {"1shot": 2, "3shot": 2, "knn": 2}
        assert record["3shot"] == pytest.approx(sum(record["draws"]["3shot"]) / 2)
    page = out.with_name("digits.md").read_text()
    assert page.startswith("# Digits\n")
    assert page.count("\n| ") == 2 + 4
    assert out.with_name("digits.png").is_file()

    monkeypatch.setattr(measure.Images, "features", None)  # a later run reads them
    again = compare("methods=['top_k build.keep_rate=0.5']", "title=Digits")
    assert again["methods"] == [found["methods"][0], found["methods"][3]]


def test_features_of_other_images_are_not_reused(compare, monkeypatch) -> None:
    transforms = "[{_target_: fewtokens.data.transforms.geometric.CenterCrop, size: 16}]"
    same = [f"data.eval_transforms={transforms}", "data.train_transforms=${data.eval_transforms}", "data.side=20"]
    assert compare("methods=[]", "shares=[]", *same)["train_images"] > 40
    monkeypatch.setattr(measure.Images, "features", None)
    with pytest.raises(TypeError, match="NoneType"):
        compare("methods=[]", "shares=[]", *same, "measure.fewshot.seed=1")


def test_a_model_with_another_budget_is_another_model() -> None:
    model, images = small(), torch.randn(2, 3, 8, 12)
    values = budgets.budgets("r", 3, 24)
    assert values[0] == [8, 8, 7]
    assert values[-1] == [0, 0, 0]
    assert budgets.nearest([1, 4, 9, 16], float, 8.0) == 9
    assert budgets.nearest([1, 4, 9, 16], float, 99.0) == 16
    assert budgets.nearest([1, 4, 9, 16], float, -1.0) == 1
    assert model(images).shape == (2, 5)


def test_a_trained_method_keeps_its_parameters_at_every_share(composed) -> None:
    cfg = composed(*SMALL, "tokenizer=dynamic_vit", base="fewshot")
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        model = instantiate(cfg.backbone).eval()
        found = list(fewshot.variants(model, "dynamic_vit", [0.8, 0.6], torch.randn(1, 1, 16, 16)))
    assert len({exact for _, exact in found}) == 2
    for variant, _ in found:
        assert variant is not model
        for name, value in model.state_dict().items():
            assert torch.equal(variant.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("methods=ats", "`methods` must be a list"),
        ("methods=['tome build.rr=3']", "Did you mean build.r?"),
        ("shares=[75]", "`shares` must be a list of shares between 0 and 1"),
        ("counted_images=0", "`counted_images` must be an int >= 1"),
        ("measure.fewshot=null", "`measure` must be fewshot"),
    ],
)
def test_errors_are_sentences(compare, wrong: str, says: str) -> None:
    with pytest.raises(FewtokensError, match=says.replace("?", r"\?")):
        compare(wrong)


def test_features_are_kept_by_all_they_depend_on(composed) -> None:
    content = dict.fromkeys(("weights", "data", "train_positions", "test_positions", "precision"), "x")

    def key(*overrides: str) -> str:
        cfg = composed("data=imagenet", "backbone.name=deit_tiny_patch16_224", *overrides, base="fewshot")
        return fewshot.features_key(cfg, "tome", content)

    assert key() == key("data.num_workers=3", "data.batch_size=7")
    changes = ("data.crop_pct=1.0", "data.interpolation=bilinear", "data.image_backend=torchvision")
    changes += ("data.parts.train=other", "data.subset.classes=5", "data.image_size=192")
    assert len({key(), *map(key, changes)}) == 1 + len(changes)
