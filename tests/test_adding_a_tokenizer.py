"""The example of docs/adding_a_tokenizer.md, as a reader would follow it."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from conftest import ROOT
from fewtokens.runs.config import instantiate

PAGE = (ROOT / "docs" / "adding_a_tokenizer.md").read_text()


def example(language: str, folder: Path) -> Path:
    """Write the example to the file that its first line names, below a folder."""
    (found,) = re.findall(rf"```{language}\n# (\S+)\n(.*?)```", PAGE, re.DOTALL)
    path = folder / found[0]
    path.parent.mkdir(parents=True)
    path.write_text(found[1])
    return path


def test_the_example_reduces_tokens(composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, config = example("python", tmp_path), yaml.safe_load(example("yaml", tmp_path).read_text())
    spec = importlib.util.spec_from_file_location("stride", source)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "stride", module)
    spec.loader.exec_module(module)
    assert config["build"]["_target_"] == "fewtokens.tokenizers.stride.Stride"
    assert source.relative_to(tmp_path) == Path("src/fewtokens/tokenizers/stride.py")
    config["build"]["_target_"] = "stride.Stride"
    cfg = composed("tokenizer=none", "data.image_size=16")
    cfg.tokenizer = config
    model = instantiate(cfg.backbone)
    assert [tokens.num_patches for tokens in model.trace(torch.randn(2, 1, 16, 16))] == [16, 8, 4, 2]


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_the_example_passes_ruff(command: list[str], tmp_path: Path) -> None:
    settings = ["--no-cache", "--config", str(ROOT / "pyproject.toml")]
    ruff = [sys.executable, "-m", "ruff", *command, *settings, str(example("python", tmp_path))]
    done = subprocess.run(ruff, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
