"""Draw what methods keep, drop or merge in photographs: python -m fewtokens.benchmarks.gallery [key=value ...]."""

import hashlib
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sklearn.datasets
import torch
from hydra.core.hydra_config import HydraConfig
from jaxtyping import Float, UInt8
from omegaconf import DictConfig, ListConfig
from PIL import Image
from torch import Tensor

from fewtokens.analysis.cost import macs
from fewtokens.analysis.evaluation import evaluating_eagerly, unwrap_compiled
from fewtokens.analysis.flops import GIGA, count
from fewtokens.analysis.pictures.drawing import displayed
from fewtokens.analysis.pictures.sheet import (
    GAP,
    MARGIN,
    SIDE,
    Key,
    Sheet,
    legend_height,
    line_height,
    save_png,
    text_width,
)
from fewtokens.analysis.pictures.token_maps import Kind, count_tokens, kind_of, marks, origin_by_step, stage
from fewtokens.backbones.encoder import block_indices
from fewtokens.backbones.vit import ViT
from fewtokens.benchmarks.variants import backbone_name, with_method
from fewtokens.data import seeding
from fewtokens.data.image.folders import fit, read_pil
from fewtokens.data.transforms.normalize import Pipeline
from fewtokens.errors import FewtokensError, check
from fewtokens.files import write_json
from fewtokens.masking import mask
from fewtokens.runs import eval as evaluation
from fewtokens.runs import report
from fewtokens.runs.cli import command
from fewtokens.runs.config import instantiate, save
from fewtokens.runs.job import start

PHOTOGRAPHS = [Path(sklearn.datasets.__file__).parent / "images" / name for name in ("china.jpg", "flower.jpg")]
BETWEEN = 18  # pixels between the photographs
FEW = 16  # tokens that mix many patches: up to so many get a heat map each
TEXT = 17  # size of the text in pixels


@dataclass
class Row:
    """The tokens that one method has left of every photograph at every stage.

    Args:
        label: Name, settings and cost of the method.
        cells: For every photograph and stage a picture (3, H, W) and the number of patch tokens that are left.
        kinds: The ways in which the cells are drawn.
        dropped: Whether a patch is missing in any of them.
    """

    label: str
    cells: list[list[tuple[Float[Tensor, "3 h w"], int]]]
    kinds: set[Kind] = field(default_factory=set)
    dropped: bool = False


def main() -> None:
    """Run the command."""
    command("gallery", run)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Draw the photographs of the config, and write a png file and a json file beside it.

    Args:
        cfg: The composed config, see configs/gallery.yaml.

    Returns:
        The content of the json file: what was drawn with which command and versions, and for every method its
        multiply-adds per photograph and the patch tokens that are left at every stage.

    Raises:
        FewtokensError: The model takes clips, a picture is unreadable, or a setting is invalid.
    """
    output = _check(cfg)
    start(cfg)
    task = instantiate(cfg.task)
    evaluation.load_weights(cfg, task)
    model, paths, data = unwrap_compiled(task.model).eval(), _paths(cfg.images), instantiate(cfg.data)
    photographs = load_photographs(paths, model)
    images = Pipeline((), data.mean, data.std)(photographs, seeding.generator(0))
    pictures = displayed(photographs / 255, width=cfg.width, stretch=False)
    depth = len(model.encoder.layers)
    blocks = _blocks(cfg.blocks, depth)
    with model.encoder.without_reduction():
        dense = macs(model, images[:1])
    rows, records = compare(model, map(str, cfg.methods), images, pictures, blocks)
    check(len(rows) > 0, "methods", "a list with a method whose parameters the weights hold", list(cfg.methods))
    words = f"A row is a method in the same model, a column what is left after a block (of {depth}, counted from 0)."
    kinds, dropped = set[Kind]().union(*(row.kinds for row in rows)), any(row.dropped for row in rows)
    captions = [_caption(path, model, dense) for path in paths]
    titles = [f"after block {block}" for block in blocks]
    sheet = draw(pictures, captions, rows, titles, [Key(words), *marks(kinds, dropped)])
    content = {**_origin(cfg, paths), "gmacs_dense": dense / GIGA, "methods": records}
    save(cfg, Path(HydraConfig.get().runtime.output_dir))
    save_png(sheet, output)
    write_json(content, output.with_suffix(".json"))
    print(f"Picture: {output}\nNumbers: {output.with_suffix('.json')}")
    return content


def compare(
    model: ViT,
    methods: Iterable[str],
    images: Float[Tensor, "b c h w"],
    pictures: Float[Tensor, "b 3 h2 w2"],
    blocks: Sequence[int],
) -> tuple[list[Row], list[dict[str, Any]]]:
    """Return a row of every method whose parameters the weights hold, and the records of all methods.

    Args:
        model: The model whose weights all methods share.
        methods: Options of configs/tokenizer, each followed by its settings.
        images: Normalized images.
        pictures: The same images, to draw on.
        blocks: The blocks after which the tokens are drawn.
    """
    rows, records = [], []
    for entry in methods:
        variant, name = with_method(model, entry)
        if variant is None:
            records.append({"method": entry, "skipped": "its parameters are not in the weights"})
            continue
        row, record = reduced(variant, images, pictures, blocks)
        settings = [setting.removeprefix("build.") for setting in shlex.split(entry)[1:]]
        row.label = "\n".join([name, *settings, row.label])
        rows.append(row)
        records.append({"method": entry, **record})
    return rows, records


def load_photographs(paths: Sequence[Path], model: ViT) -> UInt8[Tensor, "b c h w"]:
    """Read pictures, cut the largest window of the model's shape out of their middle, and scale it to its size.

    Args:
        paths: Paths of pictures of any size.
        model: A model of images with one or three channels.

    Raises:
        FewtokensError: The model takes something else, or a picture is unreadable.
    """
    shape = model.sample_shape
    check(len(shape) == 3, "backbone", "a model of images", f"one of clips {shape}")
    check(shape[0] in (1, 3), "data.channels", "1 or 3", shape[0])
    return torch.stack([fit(read_pil(path), shape) for path in paths])


def reduced(
    model: ViT,
    images: Float[Tensor, "b c h w"],
    pictures: Float[Tensor, "b 3 h2 w2"],
    blocks: Sequence[int],
) -> tuple[Row, dict[str, Any]]:
    """Return the row of a method, and its record in the json file.

    Args:
        model: The model with the method.
        images: Normalized images.
        pictures: The same images, to draw on.
        blocks: The blocks after which the tokens are drawn.
    """
    with evaluating_eagerly(model):
        grid, trace = model.embed(images[:1]).grid, model.trace(images)
    with model.encoder.without_reduction():
        dense = macs(model, images[:1])
    if grid is None:
        raise FewtokensError("A backbone that drops patches at random cannot be drawn. Set patch_drop_rate=0.")
    origins = [origin_by_step(trace[block], 1) for block in blocks]
    counts = [count_tokens(origin) for origin in origins]
    drawn = [stage(pictures, origin, grid, FEW) for origin in origins]
    single = count(model, [images]).macs
    shares = [f"{each:.0%}" for each in sorted({round(x, 2) for x in (single / dense).tolist()})]
    cells = [[(drawn[s][p], counts[s][p]) for s in range(len(blocks))] for p in range(len(images))]
    cost = shares[0] if len(shares) == 1 else f"{shares[0][:-1]}-{shares[-1]}"
    row = Row(f"{cost} of GMACs", cells, {kind_of(origin, FEW) for origin in origins})
    row.dropped = any(bool((origin.amax(dim=1) == 0).any()) for origin in origins)
    left = {str(block): number for block, number in zip(blocks, counts, strict=True)}
    return row, {"gmacs": (single / GIGA).tolist(), "share_of_dense": (single / dense).tolist(), "patch_tokens": left}


def draw(
    pictures: Float[Tensor, "b 3 h w"],
    captions: Sequence[str],
    rows: Sequence[Row],
    titles: Sequence[str],
    legend: Sequence[Key],
) -> Image.Image:
    """Return the sheet: the photographs on top, below each of them a column per stage, and a row per method."""
    number, _, high, wide = pictures.shape
    step, line = wide + GAP, line_height(TEXT)
    left = MARGIN + round(max(text_width(row.label, TEXT) for row in rows)) + SIDE
    group = BETWEEN + max(len(titles) * step - GAP, wide + SIDE + round(max(text_width(c, TEXT) for c in captions)))
    width = left + number * group - BETWEEN + MARGIN
    top = MARGIN + high + MARGIN + line + 4
    bottom = top + len(rows) * (high + line + GAP)
    below = legend_height(legend, TEXT, width - 2 * MARGIN)
    sheet = Sheet(width, bottom + below + 2 * MARGIN, TEXT)
    for index in range(number):
        x = left + index * group
        sheet.place(pictures[index], x, MARGIN)
        sheet.write(captions[index], x + wide + SIDE, MARGIN + high / 2, "lm")
        for column, title in enumerate(titles):
            sheet.write(title, x + column * step + wide / 2, top - 4, "mb")
            for y, row in zip(range(top, bottom, high + line + GAP), rows, strict=True):
                picture, tokens = row.cells[index][column]
                sheet.place(picture, x + column * step, y)
                sheet.write(f"{tokens} tokens", x + column * step + wide / 2, y + high + 1, "mt")
    for y, row in zip(range(top, bottom, high + line + GAP), rows, strict=True):
        sheet.write(row.label, left - SIDE, y + high / 2, "rm")
    sheet.explain(legend, MARGIN, bottom + MARGIN, width - 2 * MARGIN)
    return sheet.image


def _check(cfg: DictConfig) -> Path:
    """Return the path of the png file, after a check of the settings."""
    for name in ("methods", "blocks"):
        valid = isinstance(cfg[name], ListConfig) and len(cfg[name]) > 0
        check(valid, name, "a list, as in 'methods=[ats,\"tome build.r=8\"]' or 'blocks=[3,6]'", cfg[name])
    check(isinstance(cfg.width, int) and cfg.width >= 32, "width", "an int >= 32", cfg.width)
    if cfg.output is None:
        return Path(HydraConfig.get().runtime.output_dir) / "gallery.png"
    check(str(cfg.output).endswith(".png"), "output", "a path that ends in .png", cfg.output)
    return Path(cfg.output)


def _blocks(entries: Iterable[Any], depth: int) -> list[int]:
    """Return the indices of the blocks. In a shallow model, several entries may be the same block."""
    try:
        return sorted({index for entry in entries for index in block_indices(entry, depth)})
    except FewtokensError as error:  # which names another setting that has the same values
        raise FewtokensError(str(error).replace("`tokenizer.at`", "`blocks`")) from error


def _paths(images: Any) -> list[Path]:
    if images is None:
        return PHOTOGRAPHS
    check(isinstance(images, ListConfig) and len(images) > 0, "images", "a list of paths, as in [a.jpg,b.png]", images)
    return [Path(str(path)) for path in images]


def _caption(path: Path, model: ViT, dense: int) -> str:
    height, width = model.encoder.tokenizers[0].context.grid
    return f"{path.name}\n{height} x {width} = {height * width} patches\n{dense / GIGA:.3g} GMACs\nwithout reduction"


def _origin(cfg: DictConfig, paths: Sequence[Path]) -> dict[str, Any]:
    weights = cfg.backbone.get("weights")
    file = None if weights is None else Path(re.sub("^(scenic|keras):", "", str(weights)))
    return {
        "backbone": backbone_name(cfg),
        "image_size": cfg.data.image_size,
        "images": {path.name: _sha256(path) for path in paths},
        "weights": None if file is None else {file.name: _sha256(file)},
        "checkpoint": cfg.checkpoint,
        "command": shlex.join(["python", "-m", "fewtokens.benchmarks.gallery", *map(mask, sys.argv[1:])]),
        **report.environment(torch.device("cpu"), ("torch", "timm", "scikit-learn", "fewtokens")),
    }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
