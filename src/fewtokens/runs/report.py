"""The report of a run: report.json, a table on the screen, and what the code ran on."""

import json
import platform
import subprocess
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fewtokens.files import write_json
from fewtokens.versions import version_of

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
WRITTEN = ("pictures", "results")  # folders in docs
# Name in report.json, words, format. The same name with "_dense" is the number without the tokenizer, if there is one.
# "*" stands for "image", "clip", or "view" if samples have several.
TABLE = (
    ("test/top1", "test accuracy", "{:.2%}"),
    ("test/map", "test mean average precision", "{:.2%}"),
    ("test/skipped", "test videos that were skipped", "{:,.0f}"),
    ("test/top1_of_listed", "test accuracy, with those counted as wrong", "{:.2%}"),
    ("fewshot/10shot", "10-shot accuracy, mean of the draws", "{:.2%}"),
    ("cost/gmacs", "GMACs per *", "{:.4f}"),
    ("cost/gmacs_all_views", "GMACs of all views", "{:.4f}"),
    ("throughput/images_per_s", "*s per second", "{:,.0f}"),
    ("teacher/gmacs", "GMACs of the teacher per *", "{:.4f}"),
    ("train/seconds", "training time (s)", "{:,.0f}"),
)


def write(numbers: dict[str, float], directory: Path) -> None:
    """Write report.json, a single object of names and numbers."""
    write_json({name: float(value) for name, value in sorted(numbers.items())}, directory / "report.json")


def read(directory: Path) -> dict[str, float] | None:
    """Return the report of a finished run, or None."""
    path = directory / "report.json"
    return json.loads(path.read_text()) if path.is_file() else None


def print_table(numbers: dict[str, float], directory: Path, pictures: list[Path], method: str | None) -> None:
    """Print the most important numbers, and the paths of the report and of the pictures.

    Args:
        numbers: All numbers of the run.
        directory: The run directory.
        pictures: Files of pictures and videos.
        method: Name of the tokenizer, whose numbers are shown beside those without it; None if the model has none.
    """
    console = Console()
    headers = [""]
    if method is not None and any(f"{name}_dense" in numbers for name, *_ in TABLE):
        headers = ["all tokens", method, ""]
    compared = len(headers) > 1
    note = "GMACs: billions of multiply-adds."
    if "train/seconds" in numbers:
        note += " The same command with tokenizer=none gives the test accuracy with all tokens."
    table = Table("", show_header=compared, caption=note if compared else None, caption_justify="left")
    for header in headers:
        table.add_column(header, justify="right")
    for row in rows(numbers):
        table.add_row(*row if compared else (row[0], row[2]))
    console.print(table)
    for picture in pictures:
        console.print(f"Picture: {picture}", soft_wrap=True)
    console.print(f"Report: {directory / 'report.json'}", soft_wrap=True)


def rows(numbers: dict[str, float]) -> Iterator[tuple[str, str, str, str]]:
    """Yield the rows of the table: words, the number without the tokenizer, the number with it, and what it gains."""
    if "cost/views" in numbers and "cost/gmacs_dense" in numbers:
        numbers = numbers | {"cost/gmacs_all_views_dense": numbers["cost/views"] * numbers["cost/gmacs_dense"]}
    for name, words, form in TABLE:
        if name not in numbers or (name == "test/skipped" and not numbers[name]):
            continue
        dense, gain, value = "", "", form.format(numbers[name])
        if numbers.get(f"{name}_std"):  # an adaptive tokenizer, whose cost depends on the image
            value += f" ± {form.format(numbers[f'{name}_std'])}"
        if numbers.get(f"{name}_dense"):
            dense = form.format(numbers[f"{name}_dense"])
            ratio = numbers[name] / numbers[f"{name}_dense"]
            fewer = f"{abs(1 - ratio):.0%} {'more' if ratio > 1 else 'fewer'}"
            faster = f"{numbers.get('throughput/speedup', ratio):.2f} times as fast"
            gain = faster if name.startswith("throughput") else fewer
        yield words.replace("*", unit(numbers)), dense, value, gain


def unit(numbers: dict[str, float]) -> str:
    """Return what a model gets at once: "image", "clip", or "view" if samples have several."""
    return "view" if "cost/views" in numbers else "clip" if "cost/frames" in numbers else "image"


def commit() -> str | None:
    """Return the commit of the code, with "+changes" if files differ from it, or None outside a git repository.

    Results and pictures of the docs do not count: a command that writes them changes them while it runs.
    """
    git = ["git", "-C", str(Path(__file__).parents[3])]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = [*git, "status", "--porcelain", "--", ":/", *(f":(top,exclude)docs/{name}" for name in WRITTEN)]
        changes = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changes.strip() else "")


def device() -> str:
    """Return the names of the devices of this machine that can compute: its GPUs or its CPU."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return cpu()


def device_name(device: torch.device) -> str:
    """Return the name of a device, such as "NVIDIA H100" or "CPU, 8 threads (x86_64)"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu() if device.type == "cpu" else device.type


def cpu() -> str:
    """Return the number of threads and the architecture of the CPU."""
    return f"CPU, {torch.get_num_threads()} threads ({platform.machine()})"


def environment(device: torch.device, packages: Iterable[str]) -> dict[str, Any]:
    """Return what a measurement depends on: the device, the versions of some packages, the commit and the date."""
    return {
        "device": device_name(device),
        "versions": {name: version_of(name) for name in packages},
        "commit": commit(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }


def versions() -> dict[str, str | None]:
    """Return the versions of the packages on which results depend."""
    return {name: version_of(name) for name in PACKAGES}
