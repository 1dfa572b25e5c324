"""Write the pictures of a folder to tar shards in WebDataset's layout, with an index to read them in any order.

    python -m fewtokens.data.shard data/imagenet/train --write data/imagenet-256/train --short-side 256
    python -m fewtokens.data.shard --index data/shards-from-elsewhere/train

The first command copies the pictures as they are, or scaled down with --short-side. It decodes every picture, and lists
those that are unreadable; they are left out only with --skip. The same command continues a run that was stopped or
killed. SHA256SUMS is for `sha256sum -c`. The second command only writes the index, for shards with <key>.jpg and
<key>.cls.
"""

import argparse
import fcntl
import hashlib
import io
import itertools
import os
import re
import signal
import sys
import tarfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from fewtokens.data import seeding
from fewtokens.data.cores import available_cores
from fewtokens.data.image import folders, shards
from fewtokens.data.image.imagenet import list_pictures
from fewtokens.data.resumable import exit_code
from fewtokens.errors import FewtokensError, check, write_error
from fewtokens.files import read_record, replace_file, write_json

_CHUNK = 32  # pictures that a worker gets at once
_LOCK = ".lock"
_JOURNAL = "settings.json"  # with which the shards are written; `.<shard>.json` describes a complete one until the end
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "PNG": "png", "BMP": "bmp", "WEBP": "webp"}


@dataclass(frozen=True)
class Encoder:
    """Returns the pictures as they are stored: the original bytes, or a JPEG with a shorter side.

    Args:
        files: The pictures.
        short_side: Largest shorter side in pixels; None for the original bytes, also of pictures that are not larger.
        quality: Quality of the JPEG.
    """

    files: folders.ClassFolders
    short_side: int | None
    quality: int

    def __call__(self, indices: Sequence[int]) -> list[tuple[bytes, str] | str]:
        """Return content and suffix of each picture, or the reason if it cannot be read."""
        found: list[tuple[bytes, str] | str] = []
        for index in indices:
            try:
                found.append(self._encode(index))
            except folders.UnreadablePictureError as error:
                found.append(error.reason)
        return found

    def _encode(self, index: int) -> tuple[bytes, str]:
        path, data = self.files.path(index), self.files.read(index)
        picture = folders.decode_pil(data, path)
        content = io.BytesIO(data.numpy().data)
        shorter = min(picture.size)
        if self.short_side is None or shorter <= self.short_side:
            kind = Image.open(content).format or ""
            return content.getvalue(), _SUFFIXES.get(kind, kind.lower())
        size = [
            side * self.short_side // shorter for side in picture.size
        ]  # rounded down, as torchvision's Resize does
        scaled, content = picture.resize((size[0], size[1]), Image.Resampling.BICUBIC), io.BytesIO()
        scaled.save(content, "JPEG", quality=self.quality)
        return content.getvalue(), "jpg"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = parser().parse_args(arguments)
    return exit_code(lambda: run(args, Console()))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("source", type=Path, nargs="?", help="folder of class folders")
    found.add_argument("--write", type=Path, metavar="FOLDER", help="folder of the shards")
    found.add_argument("--index", type=Path, metavar="FOLDER", help="index the shards in this folder, and write none")
    found.add_argument("--labels", type=Path, help="file with the labels of a flat folder, as data.labels")
    found.add_argument("--short-side", type=int, help="largest shorter side in pixels, such as 256; default: as it is")
    found.add_argument("--quality", type=int, default=90, help="JPEG quality of pictures that are scaled down")
    found.add_argument("--samples", type=int, default=10_000, help="pictures per shard")
    found.add_argument(
        "--shuffle", action=argparse.BooleanOptionalAction, default=True, help="for tools that read from front to back"
    )
    found.add_argument("--skip", action="store_true", help="leave out pictures that cannot be read")
    found.add_argument("--workers", type=int, default=available_cores(), help="number of processes")
    return found


def run(args: argparse.Namespace, console: Console) -> None:
    """Write shards, or index those that exist, with a progress bar."""
    if args.index is not None:
        index_folder(args.index, console)
        return
    if args.source is None or args.write is None:
        raise FewtokensError("Give a folder of pictures and --write <folder>, or --index <folder of shards>.")
    check(args.short_side is None or args.short_side >= 16, "--short-side", "at least 16 pixels", args.short_side)
    check(1 <= args.quality <= 100, "--quality", "from 1 to 100", args.quality)
    check(args.samples >= 1, "--samples", "at least 1", args.samples)
    check(args.workers >= 1, "--workers", "at least 1", args.workers)
    files = list_pictures(args.source, args.labels, "Give the folder that contains the class folders")
    write(files, args.write, args, console)


def write(files: folders.ClassFolders, target: Path, args: argparse.Namespace, console: Console) -> None:
    """Write all shards that are not complete yet, then the index, and remove the journal.

    Raises:
        FewtokensError: The folder holds other shards, another process writes to it, it cannot be written, or a picture
            cannot be read.
    """
    with _locked(target):
        _write(files, target, args, console)


def _write(files: folders.ClassFolders, target: Path, args: argparse.Namespace, console: Console) -> None:
    count = len(files.files)
    order = (
        torch.randperm(count, generator=seeding.generator(seeding.ORDER, 0)) if args.shuffle else torch.arange(count)
    )
    parts = {f"{target.name}-{number:06d}.tar": part for number, part in enumerate(order.split(args.samples))}
    done = _resume(target, list(parts), _settings(files, args))
    if (target / shards.INDEX).exists():
        console.print(f"The shards are complete: {target}", highlight=False, soft_wrap=True)
        return
    todo = {name: part for name, part in parts.items() if name not in done}
    encode = Encoder(files, args.short_side, args.quality)
    indices = [index for part in todo.values() for index in part.tolist()]
    with _results(encode, indices, args.workers) as results:
        rows = zip(indices, track(results, "pictures", len(indices), console=console), strict=True)
        for name, part in todo.items():
            done[name] = _write_shard(target / name, files, itertools.islice(rows, len(part)))
            write_json(done[name], target / f".{name}.json")
        next(rows, None)  # ends the bar
    skipped = [entry for name in parts for entry in done[name]["skipped"]]
    for path, reason in skipped:
        console.print(f"{path}: {reason}", style="red", markup=False, highlight=False, soft_wrap=True)
    if skipped and not args.skip:
        raise FewtokensError(
            f"{len(skipped)} of {count} pictures cannot be read, so that no index is written. Replace them and remove "
            f"{target} to start again, or add --skip to leave them out."
        )
    _finish(files, target, done, console)


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Return a context in which no other process that uses this function writes to a folder, which it makes."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        file = (target / _LOCK).open("w")
    except OSError as error:
        raise write_error(target, error) from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, worker processes do not keep this lock
        except (BlockingIOError, PermissionError):
            raise FewtokensError(
                f"Another process writes to {target}. Wait for its end, or choose another --write."
            ) from None
        except OSError:  # some network file systems have no locks
            pass
        yield


def _settings(files: folders.ClassFolders, args: argparse.Namespace) -> dict[str, Any]:
    digest = hashlib.sha256(b"\0".join(files.files.tolist()) + files.targets.numpy().tobytes()).hexdigest()
    chosen = {name: getattr(args, name) for name in ("short_side", "quality", "samples", "shuffle")}
    return {"pictures": len(files.files), "names": digest, **chosen}


def _resume(target: Path, names: Sequence[str], settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the records of the shards that are complete, by name."""
    journal = target / _JOURNAL
    if journal.exists():
        started = read_record(journal)
        if started != settings:
            differ = [name for name in settings if started.get(name) != settings[name]]
            raise FewtokensError(
                f"The shards in {target} were started with { ({x: started.get(x) for x in differ}) }, and it is now "
                f"{ ({x: settings[x] for x in differ}) }. Use the same settings, choose another --write, or remove the "
                "folder."
            )
    elif any(path.name != _LOCK for path in target.iterdir()):
        raise FewtokensError(f"The folder {target} is not empty. Choose another --write, or remove the folder.")
    write_json(settings, journal)
    records = {name: read_record(target / f".{name}.json") for name in names if (target / name).exists()}
    return {name: record for name, record in records.items() if record}


@contextmanager
def _results(encode: Encoder, indices: list[int], workers: int) -> Iterator[Iterator[tuple[bytes, str] | str]]:
    """Return a context with the results of `encode` in order, from processes that work a little ahead."""
    chunks = iter([indices[start : start + _CHUNK] for start in range(0, len(indices), _CHUNK)])
    if workers == 1 or not indices:
        yield (result for chunk in chunks for result in encode(chunk))
        return
    with ProcessPoolExecutor(workers, get_context("fork"), _ignore_signals) as pool:
        waiting = deque(pool.submit(encode, chunk) for chunk in itertools.islice(chunks, 4 * workers))

        def results() -> Iterator[tuple[bytes, str] | str]:
            while waiting:
                yield from waiting.popleft().result()
                waiting.extend(pool.submit(encode, chunk) for chunk in itertools.islice(chunks, 1))

        try:
            yield results()
        except BrokenProcessPool as error:
            raise FewtokensError(
                "A worker process was ended from outside, perhaps because memory ran out. The same command continues; "
                "lower --workers."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _ignore_signals() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _write_shard(
    path: Path, files: folders.ClassFolders, rows: Iterable[tuple[int, tuple[bytes, str] | str]]
) -> dict[str, Any]:
    """Write one tar file atomically. Return its sha256, its pictures and those that cannot be read."""
    samples, skipped = list[tuple[int, int, int]](), list[tuple[str, str]]()
    with replace_file(path, "wb") as file:
        hashed: Any = _Hashed(file)
        with tarfile.open(fileobj=hashed, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
            for index, result in rows:
                if isinstance(result, str):
                    skipped.append((str(files.path(index)), result))
                    continue
                content, suffix = result
                samples.append((index, tar.offset + tarfile.BLOCKSIZE, len(content)))
                # The number makes keys unique and gives them the order of the folders; names can have any characters.
                name = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(os.fsdecode(files.files[index])).stem)[:60]
                _add(tar, f"{index:08d}-{name}.{suffix}", content)
                _add(tar, f"{index:08d}-{name}.cls", str(int(files.targets[index])).encode())
    return {"sha256": hashed.digest.hexdigest(), "samples": samples, "skipped": skipped}


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # without times and owners, so that the same pictures give the same file
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


class _Hashed:
    """A file for writing that computes the sha256 of what is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return self.file.write(content)


def _finish(files: folders.ClassFolders, target: Path, done: dict[str, dict[str, Any]], console: Console) -> None:
    found = []
    for name, record in sorted(done.items()):
        shard = shards.Shard(name, (target / name).stat().st_size, record["sha256"])
        rows = [
            (os.fsdecode(files.files[i]), int(files.targets[i]), offset, size) for i, offset, size in record["samples"]
        ]
        found.append((shard, [shards.Sample(*row) for row in rows]))
    with replace_file(target / "SHA256SUMS") as file:
        file.writelines(f"{shard.state}  {shard.name}\n" for shard, _ in found)
    with replace_file(target / shards.CLASSES, errors="surrogateescape") as file:
        file.writelines(name.replace("\n", " ") + "\n" for name in files.classes)
    shards.save_index(target, files.classes, found)
    for path in [target / f".{name}.json" for name in done]:
        path.unlink()
    _report(target, found, console)


def index_folder(target: Path, console: Console) -> None:
    """Index the shards of a folder. Classes are named by its `classes.txt`, or else by their numbers.

    Raises:
        FewtokensError: There are no shards, or one of them cannot be read.
    """
    paths = sorted(target.glob("*.tar"))
    if not paths:
        raise FewtokensError(f"There are no tar files in {target}. Give the folder that contains them.")
    found = [shards.scan_tar(path) for path in track(paths, "shards", console=console)]
    names = target / shards.CLASSES
    most = 1 + max((sample.label for _, samples in found for sample in samples), default=-1)
    classes = shards.read_classes(names) if names.exists() else [str(number) for number in range(most)]
    check(len(classes) >= most, str(names), f"a list of {most} classes or more, as the shards have", len(classes))
    shards.save_index(target, classes, found)
    _report(target, found, console)


def _report(target: Path, found: Sequence[tuple[shards.Shard, Sequence[shards.Sample]]], console: Console) -> None:
    pictures, size = sum(len(samples) for _, samples in found), sum(shard.size for shard, _ in found)
    console.print(
        f"{pictures:,} pictures in {len(found)} shards, {size:,} bytes: {target}", highlight=False, soft_wrap=True
    )


if __name__ == "__main__":
    sys.exit(main())
