"""Clips per second and core of each decoder, called directly and through this package, on the same random clips.

    python -m fewtokens.benchmarks.video_input <files or folders> --prepare

The variants take turns clip by clip; the table gives the median, lowest and highest rate over the rounds.

    reference           the decoder's own call with its own resize, in this process, as its documentation shows it
    read                the reader that training uses, in another process, with the file's properties from a manifest
    read, info unknown  the same reader, which has to find the properties of the file for every clip
    sample              everything that a worker of the data loader does for a video

With --prepare all variants also read copies as `python -m fewtokens.data.prepare --transcode` writes them.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

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
from fewtokens.masking import mask

Variant = Callable[[int, int], object]  # reads the clip of video `index` that is sampled in epoch `epoch`


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args, console = parser().parse_args(arguments), Console()
    torch.set_num_threads(1)  # rates are per core; and idle threads of torch slow down torchcodec's own call
    try:
        figures = compare(args, console)
    except FewtokensError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    if args.write is not None:
        words = [Path(word).name if "/" in word else mask(word) for word in arguments or sys.argv[1:]]
        figures = {"command": " ".join(["python -m fewtokens.benchmarks.video_input", *words]), **figures}
        args.write.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("paths", type=Path, nargs="+", help="video files, or folders of them")
    found.add_argument("--decoders", nargs="+", choices=list(DECODERS), default=list(DECODERS))
    found.add_argument("--frames", type=int, default=32, help="frames per clip")
    found.add_argument("--stride", type=int, default=2, help="distance between the frames of a clip")
    found.add_argument(
        "--short-side", type=int, default=224, help="shorter side of the frames that are read, in pixels"
    )
    found.add_argument("--prepare", action="store_true", help="measure prepared copies as well")
    found.add_argument("--copy-side", type=int, default=256, help="shorter side of the copies, in pixels")
    found.add_argument("--key-frames", type=int, default=12, help="frames from one key frame of a copy to the next")
    found.add_argument("--draws", type=int, default=2, help="clips per file and round")
    found.add_argument("--rounds", type=int, default=5)
    found.add_argument("--write", type=Path, help="json file for the results")
    return found


def compare(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure all decoders, print their tables, and return the rates with the files and settings."""
    sampling = RandomClip(args.frames, args.stride, args.short_side, args.short_side)
    rows = suitable_files(args.paths, sampling, console)
    packages = {name: version(DECODERS[name][0]) for name in installed(args.decoders, console)}
    figures = dict[str, Any]()
    with tempfile.TemporaryDirectory() as folder:
        copies = write_copies(rows, folder, args.copy_side, args.key_frames) if args.prepare else []
        for name, release in packages.items():
            found = variants(name, rows, sampling)
            if copies:
                found |= {f"prepared, {key}": variant for key, variant in variants(name, copies, sampling).items()}
            rates = measure(found, len(rows), args.draws, args.rounds)
            figures[name] = {"clips_per_s": rates, "medians": show(rates, f"{name} {release}", console)}
    names = ("frames", "stride", "short_side", "copy_side", "key_frames", "draws", "rounds")
    infos = [(Path(row.video.path).name, row.info) for row in rows]
    files = {name: f"{info.width} x {info.height}, {info.frames} frames" for name, info in infos if info}
    return {
        "files": files,
        **{name: getattr(args, name) for name in names},
        "decoders": packages,
        **about("video_input"),
        **figures,
    }


def suitable_files(paths: Sequence[Path], sampling: RandomClip, console: Console) -> list[ManifestRow]:
    """Return the files that all decoders read by frame number and that are longer than a clip."""
    files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    found, reader = list[ManifestRow](), Reader("pyav")
    for file in files:
        if file.suffix.lower() not in VIDEO_SUFFIXES:
            continue
        try:
            info = reader.video_info(str(file.absolute()))
        except UnreadableError as error:
            console.print(f"{file.name} is skipped: {error.reason}", markup=False)
            continue
        if info.access == "any" and info.frames > (sampling.frames - 1) * sampling.stride:
            found.append(_row(file.absolute(), info))
        else:
            console.print(f"{file.name} is skipped: {info.frames} frames, access {info.access}", markup=False)
    if len(found) < 2:
        raise FewtokensError(
            f"The benchmark needs at least two suitable files, got {len(found)}: plain videos (access: any) that are "
            "longer than a clip. Add more files, or lower --frames."
        )
    return found


def write_copies(rows: Sequence[ManifestRow], folder: str, short_side: int, key_frames: int) -> list[ManifestRow]:
    """Write copies as `prepare --transcode` does."""
    found, reader = list[ManifestRow](), Reader("pyav", 600.0)
    for number, row in enumerate(rows):
        target = f"{folder}/{number}.mp4"
        info = reader.examine(
            row.video.path, target, start=None, end=None, short_side=short_side, key_frames=key_frames
        )
        found.append(_row(Path(target), info))
    return found


def _row(path: Path, info: VideoInfo) -> ManifestRow:
    return ManifestRow(Video(str(path), (0,)), info, 0, info.frames, path.stat().st_size, "", None)


def installed(names: Sequence[str], console: Console) -> list[str]:
    """Return the decoders that can be loaded."""
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


def variants(decoder: str, rows: Sequence[ManifestRow], sampling: RandomClip, seed: int = 0) -> dict[str, Variant]:
    """Return the functions to compare for a decoder. They read the same clips; each has its own reader process."""
    data = VideoDataset(Path("/"), rows, sampling, Reader(decoder), seed=seed)
    reader, uninformed = Reader(decoder), Reader(decoder)

    def plan(epoch: int, index: int) -> tuple[str, Plan, VideoInfo]:
        path, info = rows[index].video.path, rows[index].info
        assert info is not None
        return path, sampling.plan(info, seeding.generator(seeding.IMAGE, seed, epoch, index)), info

    def reference(epoch: int, index: int) -> object:
        return read_reference(decoder, *plan(epoch, index))

    def read(epoch: int, index: int) -> object:
        path, wanted, info = plan(epoch, index)
        return reader.read(path, wanted.needed().tolist(), wanted.short_side, info)

    def read_uninformed(epoch: int, index: int) -> object:
        path, wanted, _ = plan(epoch, index)
        return uninformed.read(path, wanted.needed().tolist(), wanted.short_side)

    def sample(epoch: int, index: int) -> object:
        if isinstance(batch := data.__getitems__([epoch * len(rows) + index]), FewtokensError):
            raise batch
        return batch

    return {"reference": reference, "read": read, "read, info unknown": read_uninformed, "sample": sample}


def read_reference(decoder: str, path: str, plan: Plan, info: VideoInfo) -> object:
    """Return the frames (T, H, W, 3; torchcodec: T, 3, H, W) as the decoder's documentation recommends to read them."""
    indices, (width, height) = plan.needed(), info.size(plan.short_side)
    if decoder == "decord":
        decord = decoders.load(decoder)
        reader = decord.VideoReader(path, decord.cpu(0), width, height, num_threads=1)
        return reader.get_batch(indices).asnumpy()
    if decoder == "torchcodec":
        package = decoders.load(decoder)
        resize = [package.transforms.Resize((height, width))]
        video = package.decoders.VideoDecoder(path, num_ffmpeg_threads=1, transforms=resize)
        return video.get_frames_at(indices.tolist()).data
    return _read_pyav(path, set(indices.tolist()), width, height)


def _read_pyav(path: str, wanted: set[int], width: int, height: int) -> object:
    frames, last = [], max(wanted)
    scaled: Any = {"format": "rgb24", "width": width, "height": height, "interpolation": "BILINEAR", "threads": 1}
    with av.open(path) as container:
        stream: Any = container.streams.video[0]
        stream.codec_context.thread_count = 1
        rate, start = stream.average_rate * stream.time_base, stream.start_time or 0
        container.seek(start + int(min(wanted) / rate), stream=stream)
        for frame in container.decode(stream):
            number = round((frame.pts - start) * rate)
            if number in wanted:
                frames.append(frame.to_ndarray(**scaled))
            if number >= last:
                return np.stack(frames)
    raise UnreadableError(path, "it ends too early")


def measure(found: dict[str, Variant], files: int, draws: int, rounds: int) -> dict[str, list[float]]:
    """Return the clips per second of each variant in each round, after one round of warm-up."""
    names = list(found)
    rates: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        seconds = dict.fromkeys(names, 0.0)
        # A variant never reads the same file twice in a row: its process remembers the packets of the last file.
        for epoch, index in itertools.product(range(draws), range(files)):
            first = (number + epoch + index) % len(names)
            for name in names[first:] + names[:first]:
                start = time.perf_counter()
                found[name](epoch, index)
                seconds[name] += time.perf_counter() - start
        if number:
            for name, elapsed in seconds.items():
                rates[name].append(files * draws / elapsed)
    return rates


def show(found: dict[str, list[float]], title: str, console: Console) -> dict[str, dict[str, float]]:
    """Print the rates of all variants and their ratios to the first one, the reference. Return the medians."""
    table = Table("variant", "clips/s", "lowest", "highest", "relative to reference", title=title)
    base, medians = next(iter(found.values())), dict[str, dict[str, float]]()
    for name, rates in found.items():
        ratio = statistics.median(rate / reference for rate, reference in zip(rates, base, strict=True))
        medians[name] = {"clips_per_s": statistics.median(rates), "relative_to_reference": ratio}
        table.add_row(name, *(f"{x:.2f}" for x in (statistics.median(rates), min(rates), max(rates), ratio)))
    console.print(table)
    return medians


if __name__ == "__main__":
    sys.exit(main())
