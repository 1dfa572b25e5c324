"""Input speed on JPEG pictures, in images per second: ImageFolder with PIL and torchvision, and this package's loaders.

    python -m fewtokens.benchmarks.picture_input data/imagenet/val --limit 5000

All pipelines take turns, each with one worker process, so that rates are per core: decode, random resized crop to 224
pixels, flip. The usual pipeline also converts to float and normalizes, which this package leaves to the device. The
folder is copied to tar shards, as it is and with a shorter side of 256 pixels. A second table compares the pixels, and
--cold reads every picture once after the page cache was emptied.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from timm.data import create_transform
from torch.utils.data import DataLoader
from torchvision import transforms as tv
from torchvision.datasets import ImageFolder

from fewtokens.benchmarks.image_input import about, measure
from fewtokens.data import shard
from fewtokens.data.image import folders
from fewtokens.data.image.imagenet import ImageNet
from fewtokens.errors import FewtokensError, check
from fewtokens.files import write_json

_SIDE, _SMALL = 224, "shards at 256"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args, console = parser().parse_args(arguments), Console()
    torch.set_num_threads(1)
    try:
        _check(args)
        with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
            figures = compare(args, Path(folder), console)
        if args.write is not None:
            write_json({**about("picture_input"), **figures}, args.write)
    except FewtokensError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("root", type=Path, help="folder of class folders")
    found.add_argument("--limit", type=int, help="largest number of pictures, chosen at random")
    found.add_argument("--seconds", type=float, default=5.0, help="duration of one measurement")
    found.add_argument("--rounds", type=int, default=5)
    found.add_argument("--batch-size", type=int, default=32)
    found.add_argument("--interpolation", choices=["bilinear", "bicubic"], default="bilinear")
    found.add_argument("--cold", action="store_true", help="also measure folders and shards with an empty page cache")
    found.add_argument("--scratch", help="folder for the shards; default: that of temporary files")
    found.add_argument("--write", type=Path, help="json file for the results")
    return found


def _check(args: argparse.Namespace) -> None:
    check(args.limit is None or args.limit >= 1, "--limit", "an int >= 1", args.limit)
    check(args.seconds > 0, "--seconds", "a number > 0", args.seconds)
    check(args.rounds >= 1, "--rounds", "an int >= 1", args.rounds)
    check(args.batch_size >= 1, "--batch-size", "an int >= 1", args.batch_size)
    check(args.scratch is None or Path(args.scratch).is_dir(), "--scratch", "a folder", args.scratch)


def compare(args: argparse.Namespace, scratch: Path, console: Console) -> dict[str, Any]:
    """Write the shards, measure all pipelines, print the tables, and return the figures."""
    source, names = scratch / "folders", ("folders", "shards", _SMALL)
    files = folders.scan(args.root.absolute(), "Give a folder of class folders")
    chosen = torch.randperm(len(files.files), generator=torch.Generator().manual_seed(0))[: args.limit].tolist()
    # All pipelines drop the last batch if it is not full, and would wait for the first one without end.
    check(args.batch_size <= len(chosen), "--batch-size", f"at most {len(chosen)}, the pictures", args.batch_size)
    for index in chosen:
        link = source / "train" / files.path(index).relative_to(files.root)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(files.path(index))
    for name, options in (("shards", []), (_SMALL, ["--short-side", "256"])):
        if shard.main([str(source / "train"), "--write", str(scratch / name / "train"), "--skip", *options]):
            raise FewtokensError(f"The shards of {args.root} cannot be written; see above.")
    data = {name: load(scratch / name, args) for name in names}
    pipelines: dict[str, Callable[[], Iterator[int]]] = {"usual": partial(usual, source / "train", args)}
    pipelines |= {name: partial(ours, one) for name, one in data.items()}
    found = measure(pipelines, args.seconds, args.rounds)
    table = Table("pipeline", "images/s", "lowest", "highest", "relative to usual", title="one worker each")
    ratios = {}
    for name, rates in found.items():
        ratios[name] = statistics.median(a / b for a, b in zip(rates, found["usual"], strict=True))
        shown = [f"{x:,.0f}" for x in (statistics.median(rates), min(rates), max(rates))]
        table.add_row(name, *shown, f"{ratios[name]:.2f}")
    console.print(table)
    pixels = differences(data, args.interpolation)
    table = Table("pixels (0 to 255) against PIL", "mean difference", "largest")
    for name, (mean, largest) in pixels.items():
        table.add_row(name, f"{mean:.3f}", f"{largest:.0f}")
    console.print(table)
    cold = {name: cold_rate(data[name]) for name in names} if args.cold else {}
    for name, rate in cold.items():
        console.print(f"{name}, empty page cache: {rate:,.0f} images/s")
    settings = {name: getattr(args, name) for name in ("limit", "batch_size", "interpolation")}
    size = len(data["folders"]._part("train"))  # type: ignore[arg-type]
    return {"pictures": size, **settings, "images_per_s": found, "ratios": ratios, "pixels": pixels, "cold": cold}


def load(root: Path, args: argparse.Namespace) -> ImageNet:
    """Return the datamodule of a folder, set up for training and evaluation."""
    count = len(folders.class_names(root.parent / "folders" / "train"))
    data = ImageNet(
        root,
        parts={"val": "train"},
        num_classes=count,
        image_size=_SIDE,
        interpolation=args.interpolation,
        batch_size=args.batch_size,
        num_workers=1,
        drop_last=True,
        mean=_MEAN,
        std=_STD,
    )
    data.setup("fit")
    return data


def usual(root: Path, args: argparse.Namespace) -> Iterator[int]:
    """Yield the size of every batch of the usual pipeline, without end."""
    crop = tv.RandomResizedCrop(_SIDE, interpolation=tv.InterpolationMode(args.interpolation))
    steps = [crop, tv.RandomHorizontalFlip(), tv.ToTensor(), tv.Normalize(_MEAN, _STD)]
    samples = ImageFolder(str(root), tv.Compose(steps))
    more: dict[str, Any] = {"num_workers": 1, "persistent_workers": True}
    loader = DataLoader(samples, args.batch_size, shuffle=True, drop_last=True, **more)
    while True:
        for images, _ in loader:
            yield len(images)


def ours(data: ImageNet) -> Iterator[int]:
    """Yield the size of every batch of this package's loader, without end."""
    loader, epoch = data.train_dataloader(), 0
    while True:
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for images, _ in loader:
            yield len(images)
        epoch += 1


def differences(data: dict[str, ImageNet], interpolation: str, most: int = 200) -> dict[str, tuple[float, float]]:
    """Return the mean and the largest difference of pixels from those of PIL, for the same random draws.

    Those of training depend on the size of the picture, so that crops of scaled pictures are others.
    """
    found: dict[str, list[torch.Tensor]] = {}
    plain = data["folders"]._part("train")
    crop = tv.Compose(
        [
            tv.RandomResizedCrop(_SIDE, interpolation=tv.InterpolationMode(interpolation)),
            tv.RandomHorizontalFlip(),
            tv.PILToTensor(),
        ]
    )
    evaluation = create_transform((3, _SIDE, _SIDE), interpolation=interpolation, normalize=False)
    for index in np.linspace(0, len(plain) - 1, most).astype(int).tolist():  # type: ignore[arg-type]
        picture = folders.decode_pil(plain.files.read(index), plain.files.path(index))  # type: ignore[attr-defined]
        torch.manual_seed(index)
        expected = {"training": crop(picture), "evaluation": evaluation(picture)}
        for name, one in data.items():
            content, path = one._part("train").files.read(index), Path(name)  # type: ignore[attr-defined]
            torch.manual_seed(index)
            got = {"training": one._part("train").transform(one._part("train").decode(content, path))}  # type: ignore
            got["evaluation"] = one._part("val").transform(one._part("val").decode(content, path))  # type: ignore
            if name == _SMALL:
                del got["training"]
            for stage, pixels in got.items():
                found.setdefault(f"{name}, {stage}", []).append((pixels.int() - expected[stage].int()).abs())
    return {k: (float(torch.stack(v).float().mean()), float(torch.stack(v).max())) for k, v in found.items()}


def cold_rate(data: ImageNet) -> float:
    """Return the images per second of the first epoch after the files were dropped from the page cache."""
    files = data._part("train").files  # type: ignore[attr-defined]
    for path in {path.resolve() for path in files.root.rglob("*") if path.is_file()}:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    start = time.perf_counter()
    return sum(len(images) for images, _ in data.train_dataloader()) / (time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(main())
