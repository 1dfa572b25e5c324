"""An export: the model built and loaded, written file by file, and every file compared with it before it counts."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule
from omegaconf import DictConfig, open_dict
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fewtokens.analysis.cost import evaluating, plain, random_images, test_images
from fewtokens.errors import FewtokensError
from fewtokens.runs import exported, job, report
from fewtokens.runs.eval import load_weights
from fewtokens.runs.exported import SUFFIXES, Format, Forward
from fewtokens.runs.targets import instantiate

BATCH = 32  # images at once where the file takes any number; the first goes alone
DRAWS, STEP, FAR = 16, 1e-5, 100  # moves of an image, their size, and when one counts as a jump: see `jumps`


@dataclass(frozen=True)
class Agreement:
    """How a file's logits compare with the model's.

    Args:
        difference: The largest, over all images and classes.
        same_class: Share of the images with the same highest logit.
        near_ties: Images on which the two differ by more than rounding, because a tokenizer's choice between two
            tokens is decided by rounding: the model itself jumps there.
        worst: The largest difference that neither rounding nor a near tie explains; 0 if there is none.
        batches: Sizes of the batches that were compared.
    """

    difference: float
    same_class: float
    near_ties: int
    worst: float
    batches: tuple[int, ...]


def run(cfg: DictConfig) -> list[Path]:
    """Export as the config says.

    Args:
        cfg: The composed config: that of a run with overrides on top, or a model's; `export` says what to write.

    Returns:
        The files.

    Raises:
        FewtokensError: A setting, a model or a tokenizer that cannot be exported, or a file that differs from it.
    """
    formats, target = _settings(cfg.export)
    exported.check_packages(formats)
    with open_dict(cfg):
        cfg.task.compile = False  # a graph is made of the model, not of what a compiler made of it
    directory = job.start(cfg)
    task = instantiate(cfg.task)
    load_weights(cfg, task)
    model, images = plain(task.float().model), _images(cfg, task)
    fixed = cfg.export.batch_size
    program = exported.trace(model, _some(images, fixed or 2), any_batch=fixed is None)
    numbers, files = {}, []
    for name in formats:
        path = target.with_name(target.name + SUFFIXES[name])
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            part = Path(folder) / path.name
            exported.write(program, part)
            found = compare(model, exported.read(part), images, cfg.export.tolerance, fixed)
            _require(found, name, cfg.export.tolerance)
            files += exported.publish(Path(folder), path)
        numbers[path] = found
    report.write_run(cfg, directory, status="finished")
    _print(numbers, fixed, cfg.export.images, images.ndim == 5)
    return files


@torch.no_grad()
def compare(
    model: nn.Module, forward: Forward, images: Float[Tensor, "b c *t h w"], tolerance: float, batch_size: int | None
) -> Agreement:
    """Runs a file and the model on the same batches.

    Args:
        model: In any mode; it is evaluated.
        forward: The file.
        images: At least one.
        tolerance: On logits, relative to the largest where that is above 1.
        batch_size: Of the file; None for any, where batches of several sizes are compared.
    """
    batches = [images[:1], *images[1:].split(BATCH)] if batch_size is None else list(images.split(batch_size))
    batches = [_some(batch, batch_size or len(batch)) for batch in batches if len(batch)]
    differences, same = [], []
    with evaluating(model):
        for batch in batches:
            expected, got = model(batch), forward(batch)
            gap = (got - expected).abs().amax(dim=1).nan_to_num(torch.inf, torch.inf)
            limit = torch.full_like(gap, tolerance * max(1.0, expected.abs().max().item()))
            # Twice, for of two near ties the file may decide both otherwise, and each move only one of them.
            differences.append(torch.stack([gap, limit, limit if (gap <= limit).all() else 2 * jumps(model, batch)]))
            same.append(got.argmax(dim=1) == expected.argmax(dim=1))
    gaps, limits, excused = torch.cat(differences, dim=1)
    beyond, ties = ~(gaps <= torch.maximum(limits, excused)), gaps > limits
    return Agreement(
        difference=gaps.max().item(),
        same_class=torch.cat(same).float().mean().item(),
        near_ties=int((ties & ~beyond).sum()),
        worst=gaps[beyond].max().item() if beyond.any() else 0.0,
        batches=tuple(sorted({len(batch) for batch in batches})),
    )


def jumps(model: nn.Module, images: Float[Tensor, "b c *t h w"]) -> Float[Tensor, " b"]:
    """How far an image's logits jump when its pixels move by 1e-5 of their spread; 0 where they only follow.

    A method that chooses tokens is not continuous. Where two tokens are about equally good, the last bit of a sum
    decides, and another runtime adds in another order. Then some of the moves are far, and others as small as they are.
    """
    generator = torch.Generator().manual_seed(0)
    spread = images.flatten(1).std(dim=1).view(-1, *[1] * (images.ndim - 1))
    expected, found = model(images), []
    for _ in range(DRAWS):
        moved = model(images + STEP * spread * torch.randn(images.shape, generator=generator))
        found.append((moved - expected).abs().amax(dim=1))
    nearest, furthest = torch.stack(found).aminmax(dim=0)
    return torch.where(furthest > FAR * nearest.clamp_min(STEP / 10), furthest, 0.0)  # nearest may be 0 by rounding


def _settings(export: DictConfig) -> tuple[list[Format], Path]:
    """The formats, and the path without suffix."""
    formats = [export.format] if isinstance(export.format, str) else list(export.format or [])
    if not formats or not set(formats) <= set(SUFFIXES):
        raise _setting("format", " or ".join(SUFFIXES) + ", or a list of both", export.format)
    if export.images not in ("test", "random"):
        raise _setting("images", "test or random", export.images)
    for name, least in (("num_images", 1), ("batch_size", 1)):
        value = export[name]
        if not (isinstance(value, int) and value >= least) and not (name == "batch_size" and value is None):
            raise _setting(name, f"a number of at least {least}", value)
    if not (isinstance(export.tolerance, int | float) and export.tolerance > 0):
        raise _setting("tolerance", "a number above 0", export.tolerance)
    path = Path(export.path)
    if path.is_dir():
        raise _setting("path", "a file", f"the directory {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _setting("path", "a file in a folder that can be written to", f"{path}: {error.strerror}") from error
    known = path.suffix in SUFFIXES.values()
    return [cast(Format, name) for name in dict.fromkeys(formats)], path.with_suffix("") if known else path


def _setting(name: str, expected: str, got: object) -> FewtokensError:
    return FewtokensError(
        "An export has settings of its own",
        expected=f"export.{name}: {expected}",
        got=got,
        fix="see configs/export.yaml",
    )


def _images(cfg: DictConfig, task: LightningModule) -> Float[Tensor, "b c *t h w"]:
    count = cfg.export.num_images
    if cfg.export.images == "random":  # of the data only the numbers in its config count
        return random_images(plain(task.model), count, cfg.seed)
    data = instantiate(cfg.data)
    data.prepare_data()
    data.setup("test")
    return test_images(task, data, count)


def _some(images: Float[Tensor, "b c *t h w"], count: int) -> Float[Tensor, "n c *t h w"]:
    """So many of them, the first again where there are fewer."""
    return images[torch.arange(count) % len(images)]


def _require(found: Agreement, name: str, tolerance: float) -> None:
    if found.worst:
        raise FewtokensError(
            "An exported file computes what the model computes",
            expected=f"logits that differ by at most {tolerance:g}, relative to the largest where that is above 1",
            got=f"a difference of {found.worst:.3g} in {name}, the same class for {found.same_class:.1%} of the images",
            fix="this file was not written; export in the other format, or set export.tolerance if that is near enough",
        )


def _print(numbers: dict[Path, Agreement], fixed: int | None, images: str, clips: bool) -> None:
    table = Table("file", "size", "largest difference", "same class", "near ties")
    for path, found in numbers.items():
        size = sum(file.stat().st_size for file in (path, path.with_name(f"{path.name}.data")) if file.exists())
        columns = f"{size / 2**20:.1f} MiB", f"{found.difference:.1e}", f"{found.same_class:.1%}", str(found.near_ties)
        table.add_row(path.name, *columns)
    console = Console()
    console.print(table)
    sizes = ", ".join(str(size) for size in next(iter(numbers.values())).batches)
    kind = "clips" if clips else "images"
    what = f"any batch; compared on {images} {kind} by {sizes}" if fixed is None else f"batches of {fixed}"
    axes = f"{kind} (batch, channels, {'frames, ' if clips else ''}height, width)"
    console.print(f"Input: {axes}, float32, normalised as data says; {what}.")
    for path in numbers:
        console.print(f"Written: {path}", soft_wrap=True)
