"""Run directories without a run, and what a page of them consists of."""

import json
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

NUMBERS = {"test/top1": 0.9, "cost/gmacs": 5.0, "cost/gmacs_dense": 10.0, "cost/tokens_block_00": 16.0,
           "cost/tokens_block_01": 8.0, "throughput/images_per_s": 60.0, "throughput/images_per_s_dense": 40.0,
           "throughput/speedup": 1.5, "train/seconds": 61.0}  # fmt: skip
METRICS = """step,val/loss,train/loss_epoch,val/top1,train/seconds
1,2.0,,0.5,
1,,2.5,,
2,1.0,nan,0.75,
2,,1.5,,
2,,,,60
2,,,,61
"""
CONFIG = {
    "data": {"_target_": "fewtokens.data.image.digits.Digits", "num_classes": 10},
    "tokenizer": {"at": 1, "build": {"_target_": "fewtokens.tokenizers.tome.ToMe", "r": 2}},
    "optimizer": {"lr": 0.1, "betas": [0.9, 0.999]},
    "seed": 0,
}


def save_run(
    folder: Path,
    numbers: dict[str, Any] | None = None,
    about: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """Write the files of a finished run, with some entries replaced."""
    (folder / "pictures").mkdir(parents=True)
    known = {"name": "digits", "status": "finished", "command": f"python train.py seed={seed}", "seed": seed,
             "choices": {"data": "digits", "tokenizer": "tome"}, "commit": "c0ffee", "device": "CPU",
             "versions": {"torch": "2.0"}, "started": "2026-01-01T00:00:00+00:00"}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(known | (about or {})))
    (folder / "report.json").write_text(json.dumps(NUMBERS | (numbers or {})))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"seed": seed} | (config or {})))
    (folder / "metrics.csv").write_text(METRICS)
    save_picture(folder / "pictures" / "token_maps.png")
    return folder


def save_picture(path: Path, size: int = 8) -> None:
    """Write a picture of noise, which does not compress."""
    noise = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


class Page(HTMLParser):
    """The elements of an html file: names, attributes and text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """Return the attributes of all elements of a name."""
        return [attributes for name, attributes in self.elements if name == tag]

    def check(self) -> None:
        """Assert that the page is one file that runs nothing, and that everybody can read it."""
        assert not {"script", "iframe", "object", "embed", "link", "form", "base"} & {name for name, _ in self.elements}
        names = {name for _, attributes in self.elements for name in attributes}
        assert not [name for name in names if name.startswith("on")]
        addresses = [value or "" for _, attributes in self.elements for name, value in attributes.items()
                     if name in ("src", "href", "srcset", "xlink:href", "action")]  # fmt: skip
        outside = [a for a in addresses if ":" in a.partition("/")[0] and not a.startswith("data:image/")]
        assert outside == []
        assert "url(" not in self.source
        assert self.all("meta")[1]["content"].startswith("default-src 'none'")  # type: ignore[union-attr]
        assert any(attributes.get("name") == "viewport" for attributes in self.all("meta"))
        assert len(self.all("h1")) == len(self.all("title")) == 1
        assert self.all("html")[0]["lang"] == "en"
        assert all(attributes.get("alt") for attributes in self.all("img"))
        described = [a for a in self.all("svg") if a.get("aria-hidden") != "true"]
        assert all(a["role"] == "img" and a["aria-label"] for a in described)
        levels = [int(name[1]) for name, _ in self.elements if name in ("h1", "h2", "h3")]
        assert all(b <= a + 1 for a, b in pairwise(levels))
