"""The README's recipe for a new tokenizer, as a new user would follow it."""

import importlib.util
import re
import sys
from pathlib import Path

import torch
import yaml

from conftest import ROOT
from fewtokens.runs.targets import instantiate

TEXT = (ROOT / "README.md").read_text()


def block(language: str, words: str) -> str:
    found = [b for b in re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL) if words in b]
    assert len(found) == 1
    return found[0]


def test_the_recipe_for_a_new_tokenizer_works(composed, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "stride.py").write_text(block("python", "class Stride"))
    spec = importlib.util.spec_from_file_location("stride", tmp_path / "stride.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "stride", module)
    spec.loader.exec_module(module)
    monkeypatch.setenv("FEWTOKENS_ALLOW_TARGETS", "stride.")
    config = yaml.safe_load(block("yaml", "Stride"))
    assert config["build"]["_target_"] == "fewtokens.tokenizers.stride.Stride", "where the text puts the file"
    config["build"]["_target_"] = "stride.Stride"
    cfg = composed("tokenizer=none")
    cfg.tokenizer = config
    model = instantiate(cfg.backbone)
    counts = [tokens.num_patches for tokens in model.trace(torch.randn(2, 1, 8, 8))]
    assert counts == [16, 8, 4, 2]


def test_commands_and_files_that_the_readme_names_exist() -> None:
    for path in re.findall(r"\]\((docs/[^)]+)\)", TEXT):
        assert (ROOT / path).is_file(), path
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z0-9-]+)", TEXT)) <= targets
    for group, option in re.findall(r"\b(tokenizer|backbone|data|trainer|logger|experiment)=([a-z0-9_/]+)", TEXT):
        if option not in ("stride", "cifar10/strong_"):
            assert (ROOT / "configs" / group / f"{option}.yaml").is_file(), f"{group}={option}"
