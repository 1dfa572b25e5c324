"""The README and the pages in docs/: their links, and their commands, which must compose."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from conftest import ROOT
from fewtokens.runs import config

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PRIMARY = {
    "train.py": "train",
    "eval.py": "eval",
    "fewtokens.runs.export": "export",
    "fewtokens.runs.find_batch_size": "find_batch_size",
    "fewtokens.runs.find_lr": "find_lr",
    "fewtokens.benchmarks.throughput": "throughput",
    "fewtokens.benchmarks.gallery": "gallery",
    "fewtokens.demo": "demo",
}


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """Return the primary config and the overrides of every command in the code blocks of a page."""
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines() if language in ("", "bash") else ():
            words = shlex.split(line, comments=True)
            program = next((index for index, word in enumerate(words) if word in PRIMARY), None)
            if program is not None:
                overrides = [word for word in words[program + 1 :] if "=" in word and not word.startswith("--")]
                found.append((PRIMARY[words[program]], overrides))
    return found


def first_values(overrides: list[str]) -> list[str]:
    """Return the overrides of the first job of a sweep."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    return [
        f"{override.get_key_element()}={next(override.sweep_string_iterator())}"
        if override.is_sweep_override()
        else str(override.input_line)
        for override in parsed
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_make_targets_exist(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(r"\]\(([^):#]+)(?:#[^)]*)?\)", text):
        assert (page.parent / path).exists(), path
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z0-9-]+)", text, re.MULTILINE)) <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_compose(composed, tmp_path: Path, page: Path) -> None:
    saved_run = tmp_path / "saved"  # for commands that name a run
    (saved_run / "checkpoints").mkdir(parents=True)
    (saved_run / "checkpoints" / "last.ckpt").touch()
    video = ["data=kinetics400", "backbone=vivit_base"] if page.name in ("data_video.md", "vivit.md") else []
    config.save(composed("name=saved", *video), saved_run)
    for base, overrides in commands(page):
        given = [
            f"{key}={saved_run}" if key in ("checkpoint", "resume") else f"{key}={re.sub('<[^>]*>', 'x', value)}"
            for key, _, value in (override.partition("=") for override in overrides)
            if value != "..." and key != "sweep"  # which goes with -m
        ]
        if "launcher=slurm" in given and find_spec("submitit") is None:
            continue  # the extra `slurm` is not installed
        if "tokenizer=stride" not in given:  # an example of docs/adding_a_tokenizer.md
            composed(*first_values(given), base=base)
