"""Input speed on CIFAR-10, in images per second: the usual pipeline of one PIL image at a time, and this package's.

    python -m fewtokens.benchmarks.image_input --root data/cifar10      (or --generated, without data)

Both augment alike: crop after padding by 4, flip, normalize. They are measured in turns over several rounds, since the
load of the machine varies. The table shows the median, the lowest and the highest round.
"""

import argparse
import itertools
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as tv

from fewtokens.data.datamodule import Common, Part
from fewtokens.data.image.cifar10 import Cifar10
from fewtokens.data.image.in_memory import InMemory, Samples
from fewtokens.data.seeding import generator
from fewtokens.data.transforms.geometric import PadCrop, RandomFlip
from fewtokens.data.transforms.normalize import Pipeline
from fewtokens.errors import FewtokensError
from fewtokens.masking import mask
from fewtokens.runs import report

_SETTLING = 1.0  # seconds
_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Generated(InMemory):
    """50,000 random images, as many as CIFAR-10 has for training."""

    description = "random images"

    def read(self) -> dict[Part, Samples]:
        """Generate the images."""
        images = torch.randint(256, (50_000, 3, 32, 32), dtype=torch.uint8)
        return {"train": Samples(images, torch.arange(50_000) % 10)}


class _Usual(Dataset):
    def __init__(self, samples: Samples) -> None:
        self.images, self.targets = samples.images.permute(0, 2, 3, 1).numpy(), samples.targets.tolist()
        self.transform = tv.Compose(
            [
                tv.ToPILImage(),
                tv.RandomCrop(32, padding=4),
                tv.RandomHorizontalFlip(),
                tv.ToTensor(),
                tv.Normalize(_MEAN, _STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), self.targets[index]


def usual(samples: Samples, batch_size: int, workers: int) -> Iterator[int]:
    """Yield the size of every batch of the usual pipeline, without end."""
    loader = DataLoader(_Usual(samples), batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    for _ in itertools.count():
        for images, _ in loader:
            yield len(images)


def ours(data: InMemory) -> Iterator[int]:
    """Yield the size of every batch of this package's pipeline, augmented and normalized, without end."""
    pipeline = Pipeline([PadCrop(4), RandomFlip()], _MEAN, _STD)
    loader = data.train_dataloader()
    for epoch in itertools.count():
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for step, (images, _) in enumerate(loader):
            yield len(pipeline(images, generator(0, 0, epoch, step)))


def rate(batches: Iterator[int], seconds: float) -> float:
    """Return the images per second, measured over at least `seconds`."""
    start, images = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        images += next(batches)
    return images / elapsed


def measure(pipelines: dict[str, Callable[[], Iterator[int]]], seconds: float, rounds: int) -> dict[str, list[float]]:
    """Return the images per second of each pipeline in each round, measured in turns."""
    running = {name: start() for name, start in pipelines.items()}
    rates: dict[str, list[float]] = {name: [] for name in pipelines}
    for _, (name, batches) in itertools.product(range(rounds), running.items()):
        # The first second is not counted: the pipeline starts, and its workers deliver batches that were prefetched
        # while the other pipeline was measured.
        rate(batches, _SETTLING)
        rates[name].append(rate(batches, seconds))
    return rates


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = found.add_mutually_exclusive_group(required=True)
    source.add_argument("--root", help="folder of CIFAR-10")
    source.add_argument("--generated", action="store_true", help="random images instead of CIFAR-10")
    found.add_argument("--seconds", type=float, default=5.0, help="duration of one measurement")
    found.add_argument("--rounds", type=int, default=5)
    found.add_argument("--batch-size", type=int, default=512)
    found.add_argument("--workers", type=int, default=2, help="worker processes of the usual pipeline")
    # One thread against two workers is a handicap, but reliable: on a busy machine two threads wait for each other.
    found.add_argument("--threads", type=int, default=1, help="threads of this package's pipeline")
    found.add_argument("--write", type=Path, help="json file for the results")
    return found


def show(found: dict[str, list[float]], title: str) -> dict[str, float]:
    """Print the images per second of both pipelines and return how many times faster the second is."""
    table = Table("pipeline", "images/s", "lowest", "highest", title=title)
    for name, rates in found.items():
        table.add_row(name, *(f"{x:,.0f}" for x in (statistics.median(rates), min(rates), max(rates))))
    console = Console()
    console.print(table)
    usual_rates, our_rates = found.values()
    ratios = [b / a for a, b in zip(usual_rates, our_rates, strict=True)]
    ratio = {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    console.print("ratio: {ratio:.1f} (rounds from {lowest:.1f} to {highest:.1f})".format(**ratio))
    return ratio


def about(name: str) -> dict[str, Any]:
    """Return the command, the processor, the versions, the commit and the date of a measurement.

    Args:
        name: Module of the command in `fewtokens.benchmarks`.
    """
    return {
        "command": shlex.join(["python", "-m", f"fewtokens.benchmarks.{name}", *map(mask, sys.argv[1:])]),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        **report.environment(torch.device("cpu"), ("torch", "torchvision", "fewtokens")),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = parser().parse_args(arguments)
    torch.set_num_threads(args.threads)
    settings: Common = {"num_classes": 10, "image_size": 32, "batch_size": args.batch_size}
    try:
        data: InMemory = Generated(**settings) if args.generated else Cifar10(args.root, val_images=0, **settings)
        data.setup()
    except FewtokensError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    samples = data.dataset("train")
    assert samples is not None
    pipelines: dict[str, Callable[[], Iterator[int]]] = {
        f"usual: PIL, one by one, {args.workers} workers": lambda: usual(
            samples.samples, args.batch_size, args.workers
        ),
        f"fewtokens: batched, {args.threads} thread(s)": lambda: ours(data),
    }
    found = measure(pipelines, args.seconds, args.rounds)
    ratio = show(found, f"{data.description}, batch {args.batch_size}")
    if args.write is not None:
        source = {"data": "random images" if args.generated else "CIFAR-10", "batch_size": args.batch_size}
        args.write.write_text(
            json.dumps({**source, **about("image_input"), "images_per_s": found, **ratio}, indent=2) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
