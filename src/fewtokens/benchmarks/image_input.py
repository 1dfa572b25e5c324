"""Images per second of the usual CIFAR-10 input (one PIL image at a time) and of this package's, side by side.

    python -m fewtokens.benchmarks.image_input --root data/cifar10      (or --generated, without data)

Both augment alike: crop after padding by 4, flip, normalise. They take turns, and the table gives the median of the
rounds with the lowest and highest one, since other work on the machine comes and goes.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as tv

from fewtokens.data.datamodule import Part
from fewtokens.data.image.cifar10 import Cifar10
from fewtokens.data.image.in_memory import InMemory, Samples
from fewtokens.data.seeding import generator
from fewtokens.data.transforms.geometric import PadCrop, RandomFlip
from fewtokens.data.transforms.normalize import Pipeline

_SETTLING = 1.0  # seconds
_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Generated(InMemory):
    """As many random images as CIFAR-10's training part."""

    def read(self) -> dict[Part, Samples]:
        """Draws the images."""
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
    """Batch sizes as the usual pipeline delivers its batches, for ever."""
    loader = DataLoader(_Usual(samples), batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    for _ in itertools.count():
        for images, _ in loader:
            yield len(images)


def ours(data: InMemory) -> Iterator[int]:
    """Batch sizes as this package delivers its batches, augmented and normalised, for ever."""
    pipeline = Pipeline([PadCrop(4), RandomFlip()], _MEAN, _STD)
    loader = data.train_dataloader()
    for epoch in itertools.count():
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for step, (images, _) in enumerate(loader):
            yield len(pipeline(images, generator(0, 0, epoch, step)))


def rate(batches: Iterator[int], seconds: float) -> float:
    """Images per second over at least `seconds`."""
    start, images = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        images += next(batches)
    return images / elapsed


def measure(ways: dict[str, Callable[[], Iterator[int]]], seconds: float, rounds: int) -> dict[str, list[float]]:
    """Images per second of every way in every round, in turns."""
    running = {name: start() for name, start in ways.items()}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _, (name, batches) in itertools.product(range(rounds), running.items()):
        # Not counted: starting up, batches that the workers of the usual way have laid by, and their laying them by.
        rate(batches, _SETTLING)
        rates[name].append(rate(batches, seconds))
    return rates


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = found.add_mutually_exclusive_group(required=True)
    source.add_argument("--root", help="folder of CIFAR-10")
    source.add_argument("--generated", action="store_true", help="random images instead of CIFAR-10")
    found.add_argument("--seconds", type=float, default=5.0, help="length of one measurement")
    found.add_argument("--rounds", type=int, default=5)
    found.add_argument("--batch-size", type=int, default=512)
    found.add_argument("--workers", type=int, default=2, help="worker processes of the usual pipeline")
    # One thread against two workers is unfair to us, but dependable: two threads on a busy machine wait for each other.
    found.add_argument("--threads", type=int, default=1, help="threads of this package's pipeline")
    found.add_argument("--write", type=Path, help="a json file for the figures")
    return found


def show(found: dict[str, list[float]], title: str) -> dict[str, float]:
    """Prints images/s of both ways and how many times faster the second is; gives the ratio back."""
    table = Table("way", "images/s", "lowest", "highest", title=title)
    for name, rates in found.items():
        table.add_row(name, *(f"{x:,.0f}" for x in (statistics.median(rates), min(rates), max(rates))))
    console = Console()
    console.print(table)
    usual_rates, our_rates = found.values()
    ratios = [b / a for a, b in zip(usual_rates, our_rates, strict=True)]
    ratio = {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    console.print("ratio: {ratio:.1f} (rounds from {lowest:.1f} to {highest:.1f})".format(**ratio))
    return ratio


def about() -> dict[str, str]:
    """Where and when figures were measured."""
    return {
        "torch": torch.__version__,
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }


def main() -> None:
    """Reads the command line, measures, prints the table."""
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    facts = {"num_classes": 10, "image_size": 32, "batch_size": args.batch_size}
    data: InMemory = Generated(**facts) if args.generated else Cifar10(args.root, val_images=0, **facts)
    data.setup()
    samples = data.dataset("train")
    assert samples is not None
    ways: dict[str, Callable[[], Iterator[int]]] = {
        f"usual: PIL, one by one, {args.workers} workers": lambda: usual(
            samples.samples, args.batch_size, args.workers
        ),
        f"fewtokens: batched, {args.threads} thread(s)": lambda: ours(data),
    }
    found = measure(ways, args.seconds, args.rounds)
    ratio = show(found, f"{data.description}, batch {args.batch_size}")
    if args.write is not None:
        kind = {"data": "random images" if args.generated else "CIFAR-10", "batch_size": args.batch_size}
        args.write.write_text(json.dumps({**kind, **about(), "images_per_s": found, **ratio}, indent=2) + "\n")


if __name__ == "__main__":
    main()
