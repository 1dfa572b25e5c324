"""Clips per second and core of every decoder, called barely and as this package calls it, on the same draws.

    python -m fewtokens.benchmarks.video_input <files or folders> --prepare

"bare" is the decoder's own call with the resize in it, in this process. "read" is the reader that training uses, which
decodes in a process that can be given up; it has a manifest's facts, or finds them anew for every clip. "sample" is all
that a data loader's worker does for a video. With --prepare all is measured on copies too, as `prepare --transcode`
makes them. The ways take turns clip by clip; the table gives the median of the rounds with the lowest and highest one.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from fewtokens.benchmarks import bare_decoding
from fewtokens.benchmarks.image_input import about
from fewtokens.data import seeding
from fewtokens.data.video import decoders
from fewtokens.data.video.annotations import VIDEO_SUFFIXES
from fewtokens.data.video.dataset import VideoDataset
from fewtokens.data.video.manifest import ManifestRow
from fewtokens.data.video.reader import Reader
from fewtokens.data.video.records import DECODERS, UnreadableError, Video, VideoInfo, require_decoder
from fewtokens.data.video.sampling import Plan, RandomClip
from fewtokens.errors import FewtokensError

Way = Callable[[int, int], object]  # reads a clip of video `index` as epoch `epoch` draws it


class File(NamedTuple):
    """A video file and its properties."""

    path: str
    info: VideoInfo


def ways(decoder: str, videos: Sequence[File], sampling: RandomClip, seed: int) -> dict[str, Way]:
    """The same clips by one decoder in four ways; each has a process of its own."""
    rows = [ManifestRow(Video(v.path, (0,)), v.info, 0, v.info.frames, _size(v.path), "", None) for v in videos]
    data = VideoDataset(Path("/"), rows, sampling, Reader(decoder), seed=seed)
    knowing, finding = Reader(decoder), Reader(decoder)

    def plan(epoch: int, index: int) -> tuple[str, Plan, VideoInfo]:
        path, info = videos[index]
        return path, sampling.plan(info, seeding.generator(seeding.IMAGE, seed, epoch, index)), info

    def barely(epoch: int, index: int) -> object:
        return bare_decoding.read(decoder, *plan(epoch, index))

    def read(epoch: int, index: int) -> object:
        path, wanted, info = plan(epoch, index)
        return knowing.read(path, wanted.needed().tolist(), wanted.short_side, info)

    def read_unknown(epoch: int, index: int) -> object:
        path, wanted, _ = plan(epoch, index)
        return finding.read(path, wanted.needed().tolist(), wanted.short_side)

    def sample(epoch: int, index: int) -> object:
        if isinstance(batch := data.__getitems__([epoch * len(videos) + index]), FewtokensError):
            raise batch
        return batch

    return {"bare": barely, "read": read, "read, facts unknown": read_unknown, "sample": sample}


def measure(found: dict[str, Way], videos: int, draws: int, rounds: int) -> dict[str, list[float]]:
    """Clips per second of every way in every round, in turns clip by clip; one round before does not count."""
    rates: dict[str, list[float]] = {name: [] for name in found}
    for number in range(rounds + 1):
        seconds = dict.fromkeys(found, 0.0)
        for epoch in range(draws):
            for index in range(videos):  # never the same file twice in a row, or what was read of it would be known
                names = list(found)
                turn = (number + epoch + index) % len(names)
                for name in names[turn:] + names[:turn]:
                    start = time.perf_counter()
                    found[name](epoch, index)
                    seconds[name] += time.perf_counter() - start
        if number:
            for name, elapsed in seconds.items():
                rates[name].append(videos * draws / elapsed)
    return rates


def suitable(paths: Sequence[Path], sampling: RandomClip, console: Console) -> list[File]:
    """The files that all decoders read by frame number and that are long enough."""
    files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    found, reader = list[File](), Reader("pyav")
    for file in files:
        if file.suffix.lower() not in VIDEO_SUFFIXES:
            continue
        try:
            info = reader.video_info(str(file.absolute()))
        except UnreadableError as error:
            console.print(f"{file.name} is left out: {error.reason}", markup=False)
            continue
        if info.access == "any" and info.frames > (sampling.frames - 1) * sampling.stride:
            found.append(File(str(file.absolute()), info))
        else:
            console.print(f"{file.name} is left out: {info.frames} frames, access {info.access}", markup=False)
    if len(found) < 2:
        raise FewtokensError(
            "The benchmark needs two files",
            expected="plain videos that are longer than a clip",
            got=len(found),
            fix="name more files",
        )
    return found


def copies(videos: Sequence[File], folder: str, short_side: int, key_frames: int) -> list[File]:
    """Copies as `prepare --transcode` makes them."""
    found, reader = list[File](), Reader("pyav", 600.0)
    for number, video in enumerate(videos):
        target = f"{folder}/{number}.mp4"
        made = reader.examine(video.path, target, start=None, end=None, short_side=short_side, key_frames=key_frames)
        found.append(File(target, made))
    return found


def show(found: dict[str, list[float]], title: str, console: Console) -> dict[str, dict[str, float]]:
    """Prints clips/s of all ways and the ratios to the first; gives the medians back."""
    table = Table("way", "clips/s", "lowest", "highest", "of bare", title=title)
    base, medians = next(iter(found.values())), dict[str, dict[str, float]]()
    for name, rates in found.items():
        ratio = statistics.median(rate / first for rate, first in zip(rates, base, strict=True))
        medians[name] = {"clips_per_s": statistics.median(rates), "of_bare": ratio}
        table.add_row(name, *(f"{x:.2f}" for x in (statistics.median(rates), min(rates), max(rates), ratio)))
    console.print(table)
    return medians


def _size(path: str) -> int:
    return Path(path).stat().st_size


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("paths", type=Path, nargs="+", help="video files, or folders of them")
    found.add_argument("--decoders", nargs="+", choices=list(DECODERS), default=list(DECODERS))
    found.add_argument("--frames", type=int, default=32, help="of a clip")
    found.add_argument("--stride", type=int, default=2)
    found.add_argument("--short-side", type=int, default=224, help="of the frames that are read")
    found.add_argument("--prepare", action="store_true", help="measure prepared copies as well")
    found.add_argument("--copy-side", type=int, default=256, help="short side of the copies")
    found.add_argument("--key-frames", type=int, default=12, help="of the copies")
    found.add_argument("--draws", type=int, default=2, help="clips of every file and round")
    found.add_argument("--rounds", type=int, default=5)
    found.add_argument("--write", type=Path, help="a json file for the figures")
    return found


def installed(names: Sequence[str], console: Console) -> list[str]:
    """Those of the decoders that can be loaded."""
    found = []
    for name in names:
        try:
            require_decoder(name)
            if name != "pyav":
                decoders.load(name)
            found.append(name)
        except FewtokensError as error:
            console.print(f"without {name}: {error}", markup=False)
    return found


def compare(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measures all decoders and prints their tables; the figures with what they are of."""
    sampling = RandomClip(args.frames, args.stride, args.short_side, args.short_side)
    videos = suitable(args.paths, sampling, console)
    packages = {name: version(DECODERS[name][0]) for name in installed(args.decoders, console)}
    figures = dict[str, Any]()
    with tempfile.TemporaryDirectory() as folder:
        made = copies(videos, folder, args.copy_side, args.key_frames) if args.prepare else []
        for name, release in packages.items():
            found = ways(name, videos, sampling, 0)
            if made:
                found |= {f"prepared, {way}": call for way, call in ways(name, made, sampling, 0).items()}
            rates = measure(found, len(videos), args.draws, args.rounds)
            figures[name] = {"clips_per_s": rates, "medians": show(rates, f"{name} {release}", console)}
    names = ("frames", "stride", "short_side", "copy_side", "key_frames", "draws", "rounds")
    kinds = {Path(v.path).name: f"{v.info.width} x {v.info.height}, {v.info.frames} frames" for v in videos}
    return {"files": kinds, **{name: getattr(args, name) for name in names}, "decoders": packages, **about(), **figures}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args, console = parser().parse_args(arguments), Console()
    torch.set_num_threads(1)  # per core; and threads of torch that wait for each other slow down torchcodec's own call
    try:
        figures = compare(args, console)
    except FewtokensError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    if args.write is not None:
        words = [Path(word).name if "/" in word else word for word in arguments or sys.argv[1:]]
        figures = {"command": " ".join(["python -m fewtokens.benchmarks.video_input", *words]), **figures}
        args.write.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
