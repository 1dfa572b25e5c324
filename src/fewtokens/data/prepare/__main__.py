"""Examines the videos of a data set and writes the manifest that training and evaluation read.

    python -m fewtokens.data.prepare --root data/k400/train --list data/k400/train.csv --write data/k400/train.csv ...

Decodes every frame of every file; what cannot be decoded is named and left out. With --transcode it also writes copies
that are much faster to sample from. The originals are never touched. A run that was stopped or killed goes on where it
was with the same command.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fewtokens.data.prepare.examine import Settings
from fewtokens.data.prepare.scan import prepare
from fewtokens.data.video import manifest, parts
from fewtokens.data.video.records import Video
from fewtokens.errors import FewtokensError

_NAMED = 10  # refused files on the screen


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--root", type=Path, required=True, help="folder of the files")
    found.add_argument("--list", type=Path, required=True, help="list file, csv, json, or folder of class folders")
    found.add_argument("--classes", type=Path, help="all class names in the order of their numbers (data.classes)")
    found.add_argument("--multilabel", action="store_true", help="a video may have any number of classes")
    found.add_argument("--write", type=Path, required=True, help="the manifest, .csv")
    found.add_argument("--transcode", type=Path, metavar="FOLDER", help="write copies there, which become the root")
    found.add_argument("--short-side", type=int, help="scale copies down to so many pixels, e.g. 256 or 320")
    found.add_argument("--key-frames", type=int, default=12, help="frames from one key frame of a copy to the next")
    found.add_argument("--workers", type=int, default=_cores(), help="files at a time")
    found.add_argument("--limit", type=float, default=600.0, help="seconds after which a file is given up")
    found.add_argument("--checksum", action=argparse.BooleanOptionalAction, default=True, help="sha256 of every file")
    found.add_argument("--again", action="store_true", help="examine anew what has not changed, or by new settings")
    return found


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(args: argparse.Namespace, console: Console) -> None:
    """Prepares, with a progress bar, and says what came of it."""
    entries, classes = listed(args)
    settings = Settings(args.transcode, args.short_side, args.key_frames, args.checksum, args.limit, args.workers)
    counts = TextColumn("[green]{task.fields[good]} good[/] [red]{task.fields[refused]} refused")
    columns = (TextColumn("files"), BarColumn(), MofNCompleteColumn(), counts, TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=None, good=0, refused=0)

        def watch(good: int, refused: int, files: int) -> None:
            progress.update(bar, total=files, completed=good + refused, good=good, refused=refused)

        about = {"classes": classes}
        summary = prepare(entries, args.root, args.write, settings, about=about, again=args.again, watch=watch)
    report(summary, args.write, console)
    if not summary["good"]:
        raise FewtokensError(
            "A data set has videos that can be read",
            expected="at least one",
            got=f"none of {summary['videos']}",
            fix="see the reasons above; are --root and --list of the same data set?",
        )


def report(summary: dict[str, Any], file: Path, console: Console) -> None:
    """Names what was refused and says what is written where."""
    refused = [row for row in manifest.read(file) if row.reason is not None]
    for row in refused[:_NAMED]:
        path = os.fsencode(row.video.path).decode(errors="backslashreplace")
        console.print(f"refused: {path}: {row.reason}", style="red", markup=False, highlight=False, soft_wrap=True)
    if len(refused) > _NAMED:
        console.print(f"... and {len(refused) - _NAMED} more: the column reason of {file}")
    sizes = "{bytes_before:,} -> {bytes_after:,} bytes".format(**summary)
    console.print(
        f"{summary['good']} of {summary['videos']} videos are good, {summary['hours']:.2f} hours, {sizes}: {file}",
        highlight=False,
        soft_wrap=True,
    )


def check(args: argparse.Namespace) -> None:
    """Raises a FewtokensError for settings that cannot be."""
    for name, least in (("workers", 1), ("limit", 1e-9), ("key_frames", 1), ("short_side", 16)):
        value = getattr(args, name)
        if value is not None and not value >= least:
            option = "--" + name.replace("_", "-")
            raise FewtokensError(f"{option} is too small", expected=f"at least {least}", got=value, fix="raise it")
    if args.short_side is not None and args.transcode is None:
        raise FewtokensError(
            "--short-side is of the copies",
            expected="--transcode <folder>",
            got="none",
            fix="add it; without copies, training scales as it reads",
        )
    if args.write.exists() and args.list.exists() and args.write.samefile(args.list):
        raise FewtokensError(
            "The list is never overwritten", expected="another --write", got=args.write, fix="name another file"
        )


def listed(args: argparse.Namespace) -> tuple[list[Video], list[str]]:
    """The videos of the list, those last that official annotations name and that are not there; names of classes."""
    source = str(args.list.absolute() if args.list.exists() else args.list)
    given = None if args.classes is None else parts.read_classes(args.classes)
    found, missing = parts.list_videos(args.root, source, multilabel=args.multilabel, classes=given)
    classes = parts.class_names(args.root, source, args.multilabel) if given is None else given
    return found + missing, classes


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parser().parse_args(arguments)
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        check(args)
        run(args, Console())
    except FewtokensError as error:
        print(f"Error: {error}".encode(errors="backslashreplace").decode(), file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        return 128 + (error.args[0] if error.args else signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    sys.exit(main())
