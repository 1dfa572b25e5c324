"""The command that compares tokenizers by the clock: python -m fewtokens.benchmarks.throughput [key=value ...]."""

import difflib
import itertools
import logging
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from jaxtyping import Float
from lightning.pytorch import seed_everything
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fewtokens.analysis.cost import plain, random_images, test_images
from fewtokens.backbones.vit import ViT
from fewtokens.benchmarks.comparison import DENSE, Setting, compare, timms_own
from fewtokens.benchmarks.sharpening import sharpen
from fewtokens.errors import FewtokensError
from fewtokens.runs import checkpoints, report
from fewtokens.runs import config as saved
from fewtokens.runs.cli import command
from fewtokens.runs.targets import instantiate

log = logging.getLogger(__name__)
TIMM = "timm"


def main() -> None:
    """The command line."""
    command("throughput", run)


def run(cfg: DictConfig) -> list[dict[str, Any]]:
    """Compare as the config says; writes throughput.json into the run directory and prints a table.

    Args:
        cfg: The composed config, see configs/throughput.yaml.

    Returns:
        The records of throughput.json, see `fewtokens.benchmarks.comparison.compare`, with backbone, device, versions,
        command, commit and date.
    """
    settings = settings_of(cfg)
    directory = Path(HydraConfig.get().runtime.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    saved.save(cfg, directory)
    seed_everything(cfg.seed, workers=True, verbose=False)
    device = torch.device("cuda" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "cpu")
    dense = dense_model(cfg).to(device)
    images = images_of(cfg, dense, max(setting.batch for setting in settings), device)
    if cfg.sharpen is not None:
        kept = sharpen(dense, images[:8], list(cfg.sharpen))
        log.info("Sharpened: ATS keeps %s tokens", ", ".join(f"{count:.0f}" for count in kept))
    models = models_of(cfg, dense)
    about = _about(cfg, device)
    console = Console() if sys.stdout.isatty() else Console(width=120)  # in a file, rich would take 80 columns
    records: list[dict[str, Any]] = []
    for setting in settings:
        found = compare(models, images, setting, cfg.seconds, cfg.at_once)
        records += [{"backbone": about["backbone"], **record, **about} for record in found]
        show(found, f"{about['backbone']}: {setting}", console, "clips/s" if images.ndim == 5 else "images/s")
        report.write_json(records, directory / "throughput.json")  # what is measured stays, whatever comes after it
    print(f"Records: {directory / 'throughput.json'}")
    return records


def settings_of(cfg: DictConfig) -> list[Setting]:
    """Every combination of batch, compiled, precision and mode."""
    lists = [cfg.batch, cfg.precision, cfg.compiled, cfg.mode]
    if cfg.seconds <= 0 or any(isinstance(part, str | int | bool) or not len(part) for part in lists):
        raise FewtokensError(
            "A comparison takes lists of batches, precisions and modes, and time",
            expected="batch=[1,32] precision=[32-true] compiled=[false] mode=[inference] seconds=20",
            got=f"batch={cfg.batch} precision={cfg.precision} compiled={cfg.compiled} mode={cfg.mode} "
            f"seconds={cfg.seconds}",
            fix="put single values into brackets too, and quote what the shell would take: 'batch=[1,32]'",
        )
    return [Setting(*values) for values in itertools.product(*lists)]


def dense_model(cfg: DictConfig) -> ViT:
    """The backbone without a tokenizer, with the weights that the config names."""
    task = instantiate(_composed("none").task)
    if cfg.checkpoint is not None:
        checkpoints.load_model(task, saved.checkpoint_of(cfg.checkpoint))
    return plain(task.model)


def models_of(cfg: DictConfig, dense: ViT) -> dict[str, nn.Module]:
    """The dense model, timm's own, and one for every tokenizer; all share the dense one's parameters."""
    models: dict[str, nn.Module] = {DENSE: dense}
    if cfg.timm and len(dense.sample_shape) == 3:  # timm has no video models
        models[TIMM] = timms_own(dense)
    for entry in cfg.tokenizers:
        model = plain(instantiate(_composed(str(entry)).backbone))
        model.to(next(dense.parameters()).device)
        found = model.load_state_dict(dense.state_dict(), strict=False, assign=True)
        if found.missing_keys:
            log.warning("%s has parameters of its own, which are random: its speed is right, its output is not", entry)
        models[str(entry)] = model
    return models


def images_of(cfg: DictConfig, model: ViT, count: int, device: torch.device) -> Float[Tensor, "b c *t h w"]:
    """As many images or clips as the largest batch: of the test set, or random ones."""
    if cfg.images == "test":
        data, task = instantiate(cfg.data), nn.Module()
        task.model, task.device = model, device  # type: ignore[assignment]
        data.setup("test")
        return test_images(task, data, count)  # type: ignore[arg-type]
    if cfg.images != "random":
        raise FewtokensError(
            "Images are random or those of the test set", expected="random or test", got=cfg.images, fix="images=test"
        )
    return random_images(model, count, cfg.seed).to(device)


def show(records: list[dict[str, Any]], title: str, console: Console, rate: str) -> None:
    """Print one setting's records; `rate` is what images_per_s is called."""
    table = Table("tokenizer", title=title, box=box.SIMPLE)
    for name in (rate, "IQR", "speed-up", "GMACs", "padded", "MAC ratio", "realised/theoretical"):
        table.add_column(name, justify="right")
    digits = 1 if min(record["images_per_s"] for record in records) >= 10 else 3
    for record in records:
        table.add_row(
            record["tokenizer"],
            *(f"{record[name]:,.{digits}f}" for name in ("images_per_s", "images_per_s_spread")),
            f"{record['speedup_vs_dense']:.2f}",
            f"{record['gmacs']:.3f}",
            f"{record['gmacs_padded']:.3f}",
            f"{record['gmacs_dense'] / record['gmacs']:.2f}",
            f"{record['realised_over_theoretical']:.2f}",
        )
    console.print(table)


def _composed(entry: str) -> DictConfig:
    """The job's config with another tokenizer: "tome build.r=13" is tokenizer=tome tokenizer.build.r=13."""
    option, *settings = shlex.split(entry)
    job = HydraConfig.get()
    kept = [part for part in job.overrides.task if not part.startswith(("tokenizer=", "tokenizer."))]
    kept.append(f"tokenizer={option}")
    plainly = hydra.compose(job.job.config_name, kept)
    own = [part if "@" in part else f"tokenizer.{part}" for part in settings]
    try:
        return hydra.compose(job.job.config_name, [*kept, *own])
    except HydraException as error:
        names = ["at", *(f"build.{name}" for name in plainly.tokenizer.build if not str(name).startswith("_"))]
        near = [close for part in settings for close in difflib.get_close_matches(part.partition("=")[0], names, n=1)]
        raise FewtokensError(
            "What follows a tokenizer in tokenizers sets its keys",
            expected=f"{option} with {', '.join(names)}",
            got=entry,
            fix=f"did you mean {near[0]}" if near else "write it as 'tome build.r=13'",
        ) from error


def _about(cfg: DictConfig, device: torch.device) -> dict[str, Any]:
    choice = HydraConfig.get().runtime.choices["backbone"]
    name = cfg.backbone.get("name") or choice
    return {
        "backbone": str(name),
        "image_size": cfg.data.image_size,
        "frames": cfg.data.frames,
        "images": cfg.images,
        "sharpen": None if cfg.sharpen is None else list(cfg.sharpen),
        "checkpoint": cfg.checkpoint,
        "device": report.device() if device.type == "cuda" else report.cpu(),
        "versions": {name: report.version_of(name) for name in ("torch", "timm", "fewtokens")},
        "command": shlex.join(["python", "-m", "fewtokens.benchmarks.throughput", *sys.argv[1:]]),
        "commit": report.commit(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }


if __name__ == "__main__":
    main()
