"""What a run leaves behind: report.json (numbers), run.json (what ran, where and when), and a table on the screen."""

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

PACKAGES = (
    "fewtokens",
    "torch",
    "torchvision",
    "lightning",
    "hydra-core",
    "omegaconf",
    "torchmetrics",
    "timm",
    "wandb",
)
TABLE = (  # "*" is "image", or "clip", or "view" where samples have several
    ("test/top1", "test accuracy", "{:.2%}"),
    ("test/top5", "test accuracy, top 5", "{:.2%}"),
    ("test/skipped", "test videos that were skipped", "{:,.0f}"),
    ("test/top1_of_listed", "test accuracy, those counted as wrong", "{:.2%}"),
    ("cost/gmacs_dense", "GMACs per *, all tokens", "{:.4f}"),
    ("cost/gmacs", "GMACs per *, with the tokenizer", "{:.4f}"),
    ("cost/gmacs_std", "standard deviation over the *s", "{:.4f}"),
    ("cost/gmacs_padded", "GMACs per *, as batches computed them", "{:.4f}"),
    ("cost/views", "views of a sample", "{:.0f}"),
    ("cost/gmacs_all_views", "GMACs of all its views, with the tokenizer", "{:.4f}"),
    ("cost/gmacs_keras", "GMACs in the Keras example's count", "{:.4f}"),
    ("cost/params", "parameters", "{:,.0f}"),
    ("cost/peak_mib_dense", "peak memory of a batch (MiB), all tokens", "{:,.1f}"),
    ("cost/peak_mib", "peak memory of a batch (MiB), with the tokenizer", "{:,.1f}"),
    ("throughput/images_per_s_dense", "*s/s, all tokens", "{:,.1f}"),
    ("throughput/images_per_s", "*s/s, with the tokenizer", "{:,.1f}"),
    ("train/seconds", "training time (s)", "{:,.0f}"),
)


def rank() -> int:
    """Of this process among those of the job, before Lightning has set anything up."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    return int(next((os.environ[name] for name in names if name in os.environ), "0"))


def write(numbers: dict[str, float], directory: Path) -> None:
    """Write report.json: one flat object of names and numbers."""
    write_json({name: float(value) for name, value in sorted(numbers.items())}, directory / "report.json")


def read(directory: Path) -> dict[str, float] | None:
    """The report of a finished run, or None."""
    path = directory / "report.json"
    return json.loads(path.read_text()) if path.is_file() else None


def write_run(cfg: DictConfig, directory: Path, status: str) -> None:
    """Write run.json: command, choices, versions, commit, device and times."""
    path = directory / "run.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    command = shlex.join(["python", *_program(), *HydraConfig.get().overrides.task])
    choices = HydraConfig.get().runtime.choices
    content = {
        "name": cfg.name,
        "status": status,
        "command": before.get("command", command),  # a resumed run keeps the one that began it
        "last_command": command,
        "choices": {k: str(v) for k, v in choices.items() if not str(k).startswith("hydra") and v is not None},
        "seed": cfg.seed,
        "commit": commit(),
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}},
        "device": device(),
        "started": before.get("started", now),
        "written": now,
    }
    write_json(content, path)


def _program() -> list[str]:
    """What python was asked to run: a file, or a module by `-m`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return ["-m", spec.name] if spec is not None and spec.name.startswith("fewtokens.") else [Path(sys.argv[0]).name]


def commit() -> str | None:
    """The commit of the code, with "+changes" where the tree differs from it; None outside a repository."""
    root = Path(__file__).parents[3]
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changes.strip() else "")


def device() -> str:
    """What computes, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return cpu()


def cpu() -> str:
    """The processor, in words."""
    return f"CPU, {torch.get_num_threads()} threads ({platform.machine()})"


def print_table(numbers: dict[str, float], directory: Path, pictures: list[Path]) -> None:
    """The numbers that matter, and where the rest lies."""
    table = Table(show_header=False)
    unit = "view" if "cost/views" in numbers else "clip" if "cost/frames" in numbers else "image"
    for name, words, form in TABLE:
        if name in numbers:
            table.add_row(words.replace("*", unit), form.format(numbers[name]))
    console = Console()
    console.print(table)
    for picture in pictures:
        console.print(f"Picture: {picture}", soft_wrap=True)
    console.print(f"Report: {directory / 'report.json'}", soft_wrap=True)


def write_json(content: Any, path: Path) -> None:
    """Write the file at once: a reader sees the old one or the new one."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    part.replace(path)


def version_of(name: str) -> str | None:
    """Of an installed package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
