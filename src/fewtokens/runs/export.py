"""The command that exports a model: python -m fewtokens.runs.export checkpoint=<run> [key=value ...].

A file is run on images and compared with the model before it is moved to its place.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule
from omegaconf import DictConfig, ListConfig, open_dict
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fewtokens.analysis.evaluation import evaluating, unwrap_compiled
from fewtokens.errors import FewtokensError, check, write_error
from fewtokens.runs import job, model_file
from fewtokens.runs.cli import command
from fewtokens.runs.config import instantiate
from fewtokens.runs.directory import RunDirectory
from fewtokens.runs.eval import load_weights
from fewtokens.runs.model_file import SUFFIXES, Format, Forward

NOISE, DRAWS = 1e-6, 8  # size of the perturbation, relative to the largest pixel, and how often it is drawn
BATCH = 32  # largest batch of the comparison, if the file accepts any size; the first image is a batch of its own


@dataclass(frozen=True)
class Agreement:
    """The agreement of the logits of a file with those of the model.

    Args:
        difference: The largest difference; infinite if a logit is not finite.
        mismatched: Share of the images with a difference above the tolerance.
        unexplained: Share of the images with such a difference, though the model's own logits stay within the tolerance
            if the pixels change by as little as rounding does.
        same_class: Share of the images with the same highest logit.
        batches: Sizes of the batches that were compared.
    """

    difference: float
    mismatched: float
    unexplained: float
    same_class: float
    batches: tuple[int, ...]


def run(cfg: DictConfig) -> list[Path]:
    """Export a model.

    Args:
        cfg: The composed config, see configs/export.yaml.

    Returns:
        The files.

    Raises:
        FewtokensError: A setting is wrong, the model cannot be exported, or a file does not compute the same.
    """
    formats, target = read_settings(cfg.export)
    model_file.check_packages(formats)
    with open_dict(cfg):
        cfg.task.compile = "none"  # torch.export traces the model, not its compiled version
    with RunDirectory(cfg) as directory:
        job.start(cfg)
        task = instantiate(cfg.task)
        load_weights(cfg, task)
        files = _write_all(cfg, task, formats, target)
        directory.finish()
    return files


def _write_all(cfg: DictConfig, task: LightningModule, formats: list[Format], target: Path) -> list[Path]:
    model = unwrap_compiled(task.float().model)
    images = job.load_images(cfg, task, cfg.export.images, cfg.export.num_images)
    size = cfg.export.batch_size
    program = model_file.trace(model, _repeat(images, size or 2), any_batch=size is None)
    agreements, files = {}, []
    for name in formats:
        path = target.with_name(target.name + SUFFIXES[name])
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            part = Path(folder) / path.name
            model_file.write(program, part)
            found = compare(model, model_file.read(part), images, cfg.export.tolerance, size)
            require(found, name, cfg.export, model_file.compares_scores(program))
            files += model_file.publish(Path(folder), path)
        agreements[path] = found
    _print(agreements, size, cfg.export.images, images.ndim == 5)
    return files


@torch.no_grad()
def compare(
    model: nn.Module, forward: Forward, images: Float[Tensor, "b c *t h w"], tolerance: float, batch_size: int | None
) -> Agreement:
    """Run a file and the model on the same batches, and compare their logits.

    Args:
        model: The model, which is evaluated.
        forward: The function that the file computes.
        images: At least one image or clip.
        tolerance: Largest difference of logits, relative to the largest logit of a batch if that is above 1.
        batch_size: Batch size of the file, or None for batches of several sizes.
    """
    batches = [images[:1], *images[1:].split(BATCH)] if batch_size is None else list(images.split(batch_size))
    batches = [_repeat(batch, batch_size or len(batch)) for batch in batches if len(batch)]
    differences, mismatched, same, unexplained = [], [], [], 0
    with evaluating(model):
        for batch in batches:
            expected, got = model(batch), forward(batch)
            difference = (got - expected).abs().amax(dim=1).nan_to_num(torch.inf, torch.inf)
            differences.append(difference)
            limit = tolerance * max(1.0, expected.abs().max().item())
            mismatched.append(difference > limit)
            unexplained += sum(_is_stable(model, image, limit) for image in batch[difference > limit])
            same.append(got.argmax(dim=1) == expected.argmax(dim=1))
    return Agreement(
        difference=torch.cat(differences).max().item(),
        mismatched=torch.cat(mismatched).float().mean().item(),
        unexplained=unexplained / sum(map(len, batches)),
        same_class=torch.cat(same).float().mean().item(),
        batches=tuple(sorted({len(batch) for batch in batches})),
    )


def _is_stable(model: nn.Module, image: Float[Tensor, "c *t h w"], limit: float) -> bool:
    """Return whether the logits of an image stay within a limit if its pixels change by as little as rounding does."""
    noise = torch.randn(DRAWS, *image.shape, generator=torch.Generator().manual_seed(0)) * NOISE * image.abs().max()
    return bool((model(image + noise) - model(image[None])).abs().max() <= limit)


def require(found: Agreement, name: str, export: DictConfig, compares_scores: bool) -> None:
    """Raise an error if a file does not compute what the model computes.

    Args:
        found: The comparison.
        name: Format of the file.
        export: The settings.
        compares_scores: Whether the model chooses tokens by their scores. Where two scores are equal up to rounding, a
            file may choose the other token, as the model itself does after a tiny change of the pixels. Only such
            images may differ, `export.max_mismatched` of all at most.

    Raises:
        FewtokensError: Too many images differ.
    """
    allowed = export.max_mismatched if compares_scores else 0.0
    if found.mismatched > allowed or found.unexplained or found.difference == torch.inf:
        raise FewtokensError(
            f"The {name} file was not written, since it does not compute the same as the model: on "
            f"{found.mismatched:.1%} of the images (allowed: {allowed:.1%}) the logits differ by more than "
            f"export.tolerance={export.tolerance:g}, by up to {found.difference:.3g}, and on {found.unexplained:.1%} "
            f"rounding does not explain it; the class is the same for {found.same_class:.1%}. Export in another "
            "format, or allow more with export.tolerance or export.max_mismatched."
        )


def read_settings(export: Any) -> tuple[list[Format], Path]:
    """Return the formats, and the path of the files without a suffix.

    Raises:
        FewtokensError: A setting is wrong.
    """
    check(isinstance(export, DictConfig), "export", "the settings of configs/export.yaml", export)
    formats = list(export.format) if isinstance(export.format, ListConfig) else [export.format]
    valid = bool(formats) and set(formats) <= set(SUFFIXES)
    check(valid, "export.format", f"{' or '.join(SUFFIXES)}, or a list of them", export.format)
    check(export.images in ("test", "random"), "export.images", "test or random", export.images)
    images, size, share = export.num_images, export.batch_size, export.max_mismatched
    check(isinstance(images, int) and images >= 1, "export.num_images", "an int >= 1", images)
    check(size is None or (isinstance(size, int) and size >= 1), "export.batch_size", "an int >= 1 or null", size)
    positive = isinstance(export.tolerance, int | float) and export.tolerance > 0
    check(positive, "export.tolerance", "a number above 0", export.tolerance)
    check(isinstance(share, int | float) and 0 <= share < 1, "export.max_mismatched", "a share in [0, 1)", share)
    check(isinstance(export.path, str), "export.path", "a file", export.path)
    path = Path(export.path)
    check(not path.is_dir(), "export.path", "a file", f"the directory {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(f"export.path={path}", error) from error
    known = path.suffix in SUFFIXES.values()
    return [cast(Format, name) for name in dict.fromkeys(formats)], path.with_suffix("") if known else path


def _repeat(images: Float[Tensor, "b c *t h w"], count: int) -> Float[Tensor, "n c *t h w"]:
    """Return `count` images, starting again at the first if there are fewer."""
    return images[torch.arange(count) % len(images)]


def _print(agreements: dict[Path, Agreement], batch_size: int | None, images: str, clips: bool) -> None:
    table = Table("file", "size", "largest difference", "above the tolerance", "same class")
    for path, found in agreements.items():
        size = sum(file.stat().st_size for file in (path, path.with_name(f"{path.name}.data")) if file.exists())
        shares = f"{found.mismatched:.1%}", f"{found.same_class:.1%}"
        table.add_row(path.name, f"{size / 2**20:.1f} MiB", f"{found.difference:.1e}", *shares)
    console = Console()
    console.print(table)
    sizes = ", ".join(str(size) for size in next(iter(agreements.values())).batches)
    kind = "clips" if clips else "images"
    what = f"any batch; compared on {images} {kind} by {sizes}" if batch_size is None else f"batches of {batch_size}"
    axes = f"{kind} (batch, channels, {'frames, ' if clips else ''}height, width)"
    console.print(f"Input: {axes}, float32, normalized as data says; {what}.")
    for path in agreements:
        console.print(f"Written: {path}", soft_wrap=True)


if __name__ == "__main__":
    command("export", run)
