"""Compare the speed of tokenizers on one backbone: python -m fewtokens.benchmarks.throughput [key=value ...]."""

import itertools
import logging
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import LightningModule, seed_everything
from omegaconf import DictConfig, ListConfig
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from fewtokens.analysis.evaluation import unwrap_compiled
from fewtokens.backbones.vit import ViT
from fewtokens.benchmarks.sharpening import sharpen
from fewtokens.benchmarks.timing import Setting, time_models, timm_reference
from fewtokens.benchmarks.variants import DENSE, backbone_name, compose_with
from fewtokens.errors import check, check_choice
from fewtokens.files import write_json
from fewtokens.masking import mask
from fewtokens.runs import checkpoints, report
from fewtokens.runs.cli import command
from fewtokens.runs.compose import checkpoint_of
from fewtokens.runs.config import instantiate, save
from fewtokens.runs.job import load_images

log = logging.getLogger(__name__)
TIMM = "timm"


def main() -> None:
    """Run the command."""
    command("throughput", run)


def run(cfg: DictConfig) -> list[dict[str, Any]]:
    """Compare the tokenizers of the config, write throughput.json into the run directory and print tables.

    Args:
        cfg: The composed config, see configs/throughput.yaml.

    Returns:
        The records of throughput.json: those of `fewtokens.benchmarks.timing.time_models`, with backbone, device,
        versions, command, commit and date.
    """
    settings = all_settings(cfg)
    check_choice("images", cfg.images, ("random", "test"))
    directory = Path(HydraConfig.get().runtime.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    save(cfg, directory)
    seed_everything(cfg.seed, workers=True, verbose=False)
    device = torch.device("cuda" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "cpu")
    task = build_dense(cfg).to(device)
    count = max(cfg.min_images, *(setting.batch for setting in settings))  # one image repeated is not several
    dense, images = unwrap_compiled(task.model), load_images(cfg, task, cfg.images, count)
    if cfg.sharpen is not None:
        reached = sharpen(dense, images[:8], list(cfg.sharpen))
        log.info("Sharpened: ATS keeps %s tokens", ", ".join(f"{count:.0f}" for count in reached))
    models = build_models(cfg, dense)
    origin = _origin(cfg, device)
    console = Console() if sys.stdout.isatty() else Console(width=120)  # rich takes 80 columns for a file
    records: list[dict[str, Any]] = []
    for setting in settings:
        found = time_models(models, images, setting, cfg.seconds, cfg.min_images)
        records += [{"backbone": origin["backbone"], **record, **origin} for record in found]
        show(found, f"{origin['backbone']}: {setting}", console, "clips/s" if images.ndim == 5 else "images/s")
        write_json(records, directory / "throughput.json")  # after each setting, in case a later one fails
    print(f"Records: {directory / 'throughput.json'}")
    return records


def all_settings(cfg: DictConfig) -> list[Setting]:
    """Return every combination of batch, precision, compiled and mode."""
    check(isinstance(cfg.seconds, int | float) and cfg.seconds > 0, "seconds", "a number > 0", cfg.seconds)
    check(isinstance(cfg.min_images, int) and cfg.min_images >= 1, "min_images", "an int >= 1", cfg.min_images)
    check(isinstance(cfg.timm, bool), "timm", "true or false", cfg.timm)
    numbers = isinstance(cfg.sharpen, ListConfig) and all(isinstance(count, int | float) for count in cfg.sharpen)
    check(cfg.sharpen is None or numbers, "sharpen", "a list of numbers of tokens, or null", cfg.sharpen)
    known = isinstance(cfg.tokenizers, ListConfig)
    check(known, "tokenizers", "a list, as in 'tokenizers=[ats,tome build.r=13]'", cfg.tokenizers)
    lists = {name: cfg[name] for name in ("batch", "precision", "compiled", "mode")}
    for name, values in lists.items():
        valid = isinstance(values, ListConfig) and len(values) > 0
        check(valid, name, "a list, as in 'batch=[1,32]' (with quotes, because of the shell)", values)
    return [Setting(*values) for values in itertools.product(*lists.values())]


def build_dense(cfg: DictConfig) -> LightningModule:
    """Return the task with the backbone without a tokenizer, with the weights that the config names."""
    task = instantiate(compose_with("none").task)
    if cfg.checkpoint is not None:
        checkpoints.load_model(task, checkpoint_of(cfg.checkpoint))
    return task


def build_models(cfg: DictConfig, dense: ViT) -> dict[str, nn.Module]:
    """Return the dense model, timm's own, and a model for every tokenizer, which share the parameters of the first."""
    models: dict[str, nn.Module] = {DENSE: dense}
    if cfg.timm and len(dense.sample_shape) == 3:  # timm has no video models
        models[TIMM] = timm_reference(dense)
    for entry in cfg.tokenizers:
        model = unwrap_compiled(instantiate(compose_with(str(entry)).backbone))
        model.to(next(dense.parameters()).device)
        found = model.load_state_dict(dense.state_dict(), strict=False, assign=True)
        if found.missing_keys:
            log.warning("%s has parameters of its own. They are random, which affects its output but not speed", entry)
        models[str(entry)] = model
    return models


def show(records: list[dict[str, Any]], title: str, console: Console, rate: str) -> None:
    """Print the records of one setting; `rate` is the heading of images_per_s."""
    table = Table("tokenizer", title=title, box=box.SIMPLE)
    for name in (rate, "IQR", "speed-up", "GMACs", "padded", "MAC ratio", "realised/theoretical", "peak MiB"):
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
            "-" if record["peak_mib"] is None else f"{record['peak_mib']:,.0f}",
        )
    console.print(table)


def _origin(cfg: DictConfig, device: torch.device) -> dict[str, Any]:
    return {
        "backbone": backbone_name(cfg),
        "image_size": cfg.data.image_size,
        "frames": cfg.data.frames,
        "images": cfg.images,
        "sharpen": None if cfg.sharpen is None else list(cfg.sharpen),
        "checkpoint": cfg.checkpoint,
        "command": shlex.join(["python", "-m", "fewtokens.benchmarks.throughput", *map(mask, sys.argv[1:])]),
        **report.environment(device, ("torch", "timm", "fewtokens")),
    }


if __name__ == "__main__":
    main()
