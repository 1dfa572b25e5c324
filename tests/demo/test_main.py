"""The choice of the model, the errors of the command, and the files of the Space."""

import json
import tomllib
from pathlib import Path

import pytest
import yaml
from PIL import Image

from conftest import ROOT, TINY
from fewtokens.demo import __main__ as demo
from fewtokens.errors import FewtokensError
from fewtokens.runs import train as training


def finished(path: Path, started: str, status: str = "finished", **choices: str) -> Path:
    (path / "checkpoints").mkdir(parents=True)
    (path / "checkpoints" / "best.ckpt").touch()
    (path / "run.json").write_text(
        json.dumps({"status": status, "started": started, "choices": demo._default_choices() | choices})
    )
    return path


def test_the_newest_finished_run_of_the_default_job_is_shown(tmp_path: Path) -> None:
    assert demo.default_run(tmp_path) is None
    folder = tmp_path / demo._default_choices()["data"]
    finished(folder / "a", "2026-01-01")
    newest = finished(folder / "b", "2026-01-02")
    finished(folder / "c", "2026-01-03", status="failed")
    finished(folder / "d", "2026-01-04", tokenizer="none")
    finished(folder / "e", "2026-01-05")
    (folder / "e" / "checkpoints" / "best.ckpt").unlink()
    assert demo.default_run(tmp_path) == newest


def test_a_run_gives_the_model_its_classes_and_its_test_images(composed, tmp_path: Path) -> None:
    training.run(composed(*TINY, "tokenizer.build.num_tokens=3", "test=false", directory="trained"))
    cfg = composed(f"checkpoint={tmp_path / 'trained'}", "seconds=0.01", base="demo")
    predictor, pictures, about = demo.build(cfg)
    assert len(pictures) == 12
    assert "trained" in about
    found = predictor.predict(pictures[0], "own", 0.5)
    assert found.reduced.tokens == [16, 16, 3]
    assert len(found.reduced.top) == 5
    assert set(found.dense.top) <= set("0123456789")


@pytest.mark.slow
def test_a_backbone_shows_photographs(composed) -> None:
    small = ["backbone=vit_mini", "backbone.patch_size=8", "data.image_size=32", "seconds=0.01"]
    predictor, pictures, _ = demo.build(composed(*small, base="demo"))
    assert [picture.size for picture in pictures] == [(640, 427)] * 2
    assert isinstance(pictures[0], Image.Image)
    assert len(predictor.predict(pictures[1], "tome", 0.5).reduced.top) == 5
    assert any("tench" in name for name in predictor.names)


def test_wrong_settings_are_refused_with_a_sentence(composed) -> None:
    for override in ("port=0", "max_megapixels=-1", "seconds=null", "host=''", "max_waiting=0"):
        with pytest.raises(FewtokensError, match=f"`{override.partition('=')[0]}` must be"):
            demo.run(composed(override, base="demo"))


def test_the_space_installs_what_the_project_is_pinned_to() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = project["dependencies"] + project["optional-dependencies"]["demo"]
    lines = (ROOT / "docs" / "space" / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == pinned
    _, matter, _ = (ROOT / "docs" / "space" / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(matter)
    assert f"gradio=={front['sdk_version']}" in pinned
    assert (ROOT / "docs" / "space" / front["app_file"]).is_file()
