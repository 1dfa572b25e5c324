"""Write the cost of Vision Transformers with TokenLearner, beside the published numbers.

    python -m fewtokens.benchmarks.cost_table [--write docs/results/cost_table]

Multiply-adds and parameters of the models of the TokenLearner paper (Ryoo et al., NeurIPS 2021), with 8 and 16 tokens
(version 1.0) at each quarter of the depth. The models are built on the meta device, without their weights, and counted
by `fewtokens.analysis.cost.macs`.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fewtokens.analysis.cost import macs
from fewtokens.analysis.flops import GIGA
from fewtokens.backbones.vit import vit
from fewtokens.errors import FewtokensError
from fewtokens.files import replace_file, write_json
from fewtokens.runs import report
from fewtokens.tokenizers.base import Tokenizer
from fewtokens.tokenizers.token_learner import TokenLearner

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}  # width, blocks, heads
MODELS = ("S/32", "B/32", "B/16", "L/16", "L/10", "L/8")
LOCATIONS = (0.0, 0.25, 0.5, 0.75)
PAPER = "TokenLearner paper"


@dataclass(frozen=True)
class Model:
    """A model of the table.

    Args:
        name: Size and patch size, such as "B/16".
        side: Side of the images in pixels. Pixels at the edge that the patches do not cover are left out, as in scenic.
        tokens: Number of learned tokens; 0 without TokenLearner.
        at: Block before which they are learned.
        depth: Number of blocks, if it is not that of the size.
    """

    name: str
    side: int
    tokens: int = 0
    at: int = 0
    depth: int | None = None

    def __str__(self) -> str:
        blocks = "" if self.depth is None else f", {self.depth} blocks"
        learned = f", {self.tokens} tokens at block {self.at}" if self.tokens else ""
        return f"ViT-{self.name} at {self.side}{blocks}{learned}"


@dataclass(frozen=True)
class Published:
    """A published number.

    Args:
        model: The model.
        value: The number, as it was printed.
        note: Why the number here differs by more than 1 % and more than rounding, if it does.
        what: "gmacs", or "mparams" for 1e6 parameters.
        source: Where it was published.
    """

    model: Model
    value: str
    note: str = ""
    what: str = "gmacs"
    source: str = PAPER


DEIT_III = "DeiT-III's model list"
QUARTERS = (0, 3, 6, 9)  # of 12 blocks
PUBLISHED = (
    Published(
        Model("B/32", 384),
        "19.8",
        "unknown: 12 blocks are 13.0, and 11.5 for 20 blocks, half of them with 8 tokens, in the same table agrees",
    ),
    Published(Model("S/32", 384), "3.4"),
    Published(Model("B/16", 224), "17.6"),
    Published(Model("B/16", 384), "55.6"),
    Published(Model("L/16", 512), "363.1"),
    Published(Model("S/32", 384, 8, 6), "1.9"),
    Published(Model("B/16", 384, 8, 6), "28.7", "the number of tokens is not printed; with 16 it is 28.6"),
    Published(Model("S/32", 384, 8, 11, 22), "3.3"),
    Published(Model("B/32", 384, 8, 10, 20), "11.5"),
    Published(Model("B/16", 384, 8, 10, 21), "47.1"),
    Published(Model("B/16", 384, 16, 10, 21), "47.7"),
    Published(
        Model("L/16", 512, 16, 12), "178.1", "unknown: 12 dense blocks alone, of 24 that are 362.0, are more than 178.1"
    ),
    *(Published(Model("B/16", 224, 8, at), n) for at, n in zip(QUARTERS, ("0.8", "5.0", "9.2", "13.4"), strict=True)),
    *(Published(Model("B/16", 224, 16, at), n) for at, n in zip(QUARTERS, ("1.5", "5.5", "9.5", "13.6"), strict=True)),
    Published(
        Model("L/8", 384, 16, 24, 35),
        "460",
        "a head for the 18,291 classes of JFT-300M, on which it was pretrained, would make up the difference",
        "mparams",
    ),
    Published(Model("B/16", 224), "86.6", what="mparams", source=DEIT_III),
    Published(Model("L/16", 224), "304.4", what="mparams", source=DEIT_III),
    Published(Model("L/16", 224), "61.6", source=DEIT_III),
    Published(Model("L/16", 384), "191.2", source=DEIT_III),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--write",
        type=Path,
        default=Path("docs/results/cost_table"),
        help="path of the files to write, without an ending (default: %(default)s)",
    )
    path = parser.parse_args(argv).write
    models = [count(model) for model in all_models()]
    published = [compare(number) for number in PUBLISHED]
    origin = report.environment(torch.device("cpu"), ("torch", "timm", "fewtokens"))
    origin.pop("device")  # nothing was computed on one
    try:
        write_json({"models": models, "published": published, **origin}, path.with_suffix(".json"))
        with replace_file(path.with_suffix(".md")) as file:
            file.write(page(models, published, origin))
    except FewtokensError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    print("\n".join(published_table(published)))
    print(f"Written: {path.with_suffix('.json')} and {path.with_suffix('.md')}")
    return 0


def all_models() -> list[Model]:
    """Return the models of the table: every size without TokenLearner, and with it at every quarter of the depth."""
    models = []
    for name in MODELS:
        patch, depth = int(name.partition("/")[2]), SIZES[name[0]][1]
        for side in (224, 384):
            fitting = side // patch * patch
            learned = [Model(name, fitting, n, int(at * depth)) for n in (8, 16) for at in LOCATIONS]
            models += [Model(name, fitting), *learned]
    return models


def count(model: Model) -> dict[str, Any]:
    """Return a model's multiply-adds for an image (1e9) and its parameters (1e6), both with a head for 1,000 classes.

    Without TokenLearner it has a class token, as in the ViT paper; with it the mean of the tokens, as in scenic.
    """
    size, _, patch = model.name.partition("/")
    dim, depth, heads = SIZES[size]
    build = partial(TokenLearner, num_tokens=model.tokens) if model.tokens else Tokenizer
    with torch.device("meta"):
        built = vit(
            image_size=model.side,
            patch_size=int(patch),
            num_classes=1000,
            dim=dim,
            depth=model.depth or depth,
            heads=heads,
            pool="avg" if model.tokens else "token",
            tokenizer={"at": [model.at] if model.tokens else [], "build": build},
        )
        gmacs = macs(built, torch.empty(1, *built.sample_shape)) / GIGA
    return {**asdict(model), "gmacs": gmacs, "mparams": sum(p.numel() for p in built.parameters()) / 1e6}


def compare(published: Published) -> dict[str, Any]:
    """Return a published number beside the one here.

    Returns:
        The model, what is counted, `published`, `source`, `here`, `difference` (relative to the published number),
        `agrees` (within 1 %, or to the last digit that was printed) and `note`.
    """
    here, value = count(published.model)[published.what], float(published.value)
    step = 10.0 ** -len(published.value.partition(".")[2])
    agrees = abs(here - value) <= max(0.01 * value, step / 2)
    return {
        "model": str(published.model),
        "what": published.what,
        "published": published.value,
        "source": published.source,
        "here": here,
        "difference": here / value - 1,
        "agrees": agrees,
        "note": published.note,
    }


def page(models: Sequence[dict[str, Any]], published: Sequence[dict[str, Any]], origin: dict[str, Any]) -> str:
    """Return the page as Markdown."""
    return "\n".join(
        [
            "# Cost of Vision Transformers with TokenLearner",
            "",
            f"Written by `python -m fewtokens.benchmarks.cost_table` at commit {origin['commit']}. GMACs: 1e9 "
            "multiply-adds of matrix products and convolutions for one image, as in "
            "[Measuring](../measuring.md#cost); published GFLOPs count a multiply-add as one. A number agrees if it is "
            "within 1 % of the published one, or equal to it in all digits that were printed.",
            "",
            "## Published numbers",
            "",
            *published_table(published),
            "",
            "## GMACs with TokenLearner 1.0 before a block",
            "",
            *_table(models),
            "",
        ]
    )


def published_table(published: Sequence[dict[str, Any]]) -> list[str]:
    """Return the rows of the table of published numbers."""
    rows = ["| model | number | source | published | here | difference | |", "|---" * 7 + "|"]
    for p in published:
        number = {"gmacs": "GMACs", "mparams": "parameters (M)"}[p["what"]]
        here = [f"{p['here']:.2f}", f"{p['difference']:+.1%}", "agrees" if p["agrees"] else p["note"]]
        rows.append(f"| {' | '.join([p['model'], number, p['source'], p['published'], *here])} |")
    return rows


def _table(models: Sequence[dict[str, Any]]) -> list[str]:
    """Return the rows of the table of all models: a row for each size, and a column for each location."""
    places = [f"{tokens} at {at:g}" for tokens in (8, 16) for at in LOCATIONS]
    rows = [f"| model | side | parameters (M) | dense | {' | '.join(places)} |", "|---" * (4 + len(places)) + "|"]
    for start in range(0, len(models), 1 + len(places)):
        dense, *learned = models[start : start + 1 + len(places)]
        cells = [f"{dense['gmacs']:.2f}", *(f"{m['gmacs']:.2f}" for m in learned)]
        most = max(m["mparams"] for m in learned) - dense["mparams"]
        rows.append(
            f"| {dense['name']} | {dense['side']} | {dense['mparams']:.1f} ({most:+.2f}) | {' | '.join(cells)} |"
        )
    note = "In brackets: the largest number of parameters that TokenLearner adds. Locations are shares of the depth."
    return [*rows, "", note]


if __name__ == "__main__":
    sys.exit(main())
