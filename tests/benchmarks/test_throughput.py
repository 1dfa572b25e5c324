"""The command that compares tokenizers."""

import json
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir
from torch import Tensor

from conftest import CONFIGS, TINY
from fewtokens.benchmarks import throughput
from fewtokens.errors import FewtokensError

COMMAND = "fewtokens.benchmarks.throughput"
SIZES = [
    "backbone.patch_size=2",
    "backbone.dim=16",
    "backbone.depth=2",
    "backbone.heads=2",
    "data.image_size=12",
    "data.num_classes=3",
]
SMALL = ["backbone=vit_mini", "backbone.pool=token", *SIZES, "trainer=cpu", "min_images=2"]
FIELDS = {
    "tokenizer",
    "backbone",
    "batch",
    "precision",
    "compiled",
    "mode",
    "images_per_s",
    "speedup_vs_dense",
    "gmacs",
    "gmacs_dense",
    "realised_over_theoretical",
}


def records(tmp_path: Path) -> list[dict]:
    [path] = (tmp_path / "outputs" / "throughput").glob("*/throughput.json")
    return json.loads(path.read_text())


def test_every_combination_is_a_record_per_tokenizer(command, tmp_path: Path) -> None:
    tokenizers = "tokenizers=[ats,'tome build.r=2','token_fuser at=0.5 tokenizer@tokenizer.inner=pool']"
    lists = ["batch=[1,2]", "mode=[inference,training]", "precision=[32-true,bf16-mixed]"]
    done = command(COMMAND, *SMALL, tokenizers, *lists, "seconds=0.05", "sharpen=[20.0,10.0]", "+api_key=0123456789")
    [path] = (tmp_path / "outputs").rglob("throughput.json")
    assert "0123456789" not in path.read_text()
    found = records(tmp_path)
    names = ["none", "timm", "ats", "tome build.r=2", "token_fuser at=0.5 tokenizer@tokenizer.inner=pool"]
    assert [record["tokenizer"] for record in found] == names * 8
    assert all(record.keys() >= FIELDS for record in found)
    assert {record["backbone"] for record in found} == {"vit_mini"}
    assert {(r["batch"], r["mode"], r["precision"]) for r in found} == {
        (b, m, p) for b in (1, 2) for m in ("inference", "training") for p in ("32-true", "bf16-mixed")
    }
    tome = next(record for record in found if record["tokenizer"].startswith("tome"))
    assert tome["gmacs"] < tome["gmacs_dense"]
    assert "realised" in done.stdout


def test_a_trained_run_is_timed_with_its_weights_and_test_images(command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    short = [*TINY, "trainer.limit_train_batches=2"]
    command("train.py", *short, "tokenizer=none", "tokenizer.at=[]", "backbone.pool=token", f"hydra.run.dir={run}")
    timed = ["tokenizers=['top_k at=1']", "batch=[4]", "seconds=0.1", "timm=false"]
    command(COMMAND, f"checkpoint={run}", "images=test", *timed)
    assert [record["tokenizer"] for record in records(tmp_path)] == ["none", "top_k at=1"]
    assert records(tmp_path)[0]["checkpoint"] == str(run)
    assert records(tmp_path)[0]["backbone"] == "vit"


def test_clips_are_timed_without_video_data(composed, tmp_path: Path, capsys) -> None:
    video = ["backbone=vivit_mini", "data.frames=4", "data.image_size=16", "data.num_classes=3", "trainer=cpu"]
    timed = ["tokenizers=['token_learner build.num_tokens=2']", "batch=[1]", "seconds=0.1", "min_images=1"]
    cfg = composed(*video, *timed, base="throughput")
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):  # it composes one config more for every tokenizer
        found = throughput.run(cfg)
    assert json.loads((tmp_path / "run" / "throughput.json").read_text()) == found
    assert [record["tokenizer"] for record in found] == ["none", "token_learner build.num_tokens=2"], (
        "timm has no video models"
    )
    assert {(record["frames"], record["image_size"]) for record in found} == {(4, 16)}
    assert "clips/s" in capsys.readouterr().out


def test_several_small_batches_hold_different_images(composed, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[Tensor] = []
    time_models = throughput.time_models

    def remember(models: Any, images: Tensor, *settings: Any) -> Any:
        timed.append(images)
        return time_models(models, images, *settings)

    monkeypatch.setattr(throughput, "time_models", remember)
    small = [*SMALL, "tokenizers=[]", "timm=false", "batch=[2,1]", "seconds=0.05", "min_images=5"]
    cfg = composed(*small, base="throughput")
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        throughput.run(cfg)
    assert [len(images.unique(dim=0)) for images in timed] == [5, 5]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("tokenizers=[atz]", "Did you mean `tokenizer=ats`?"),
        ("tokenizers=['ats build.bugdet=3']", "Did you mean build.budget?"),
        ("batch=4", "batch=[1,32]"),
        ("precision=[float8]", "got 'float8'"),
        ("images=none", "`images` must be 'random' or 'test', got 'none'"),
    ],
)
def test_errors_are_sentences(command, wrong: str, says: str) -> None:
    done = command(COMMAND, *SMALL, wrong, "seconds=0.1", code=1)
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "wrong",
    ["tokenizers=ats", "tokenizers=7", "seconds=long", "min_images=0", "timm=maybe", "sharpen=3", "sharpen=[a]"],
)
def test_a_wrong_setting_is_named(composed, wrong: str) -> None:
    with pytest.raises(FewtokensError, match=f"^`{wrong.partition('=')[0]}` must be"):
        throughput.all_settings(composed(wrong, base="throughput"))
