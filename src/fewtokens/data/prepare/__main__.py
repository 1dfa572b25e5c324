"""Examine the videos of a data set and write the manifest that training and evaluation read.

    python -m fewtokens.data.prepare --root data/k400 --list data/k400/train.csv --write data/k400/train.manifest.csv

Decodes every frame of every file. Videos that cannot be decoded are skipped, with the reason in the manifest. With
--transcode it also writes copies that are much faster to sample from. The originals are never changed. The same command
continues a run that was stopped or killed.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fewtokens.data.cores import available_cores
from fewtokens.data.prepare.examine import PrepareSettings
from fewtokens.data.prepare.scan import prepare
from fewtokens.data.resumable import exit_code
from fewtokens.data.video import manifest, parts
from fewtokens.data.video.records import Video
from fewtokens.errors import FewtokensError, check

_SHOWN = 10  # skipped videos that are printed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = parser().parse_args(arguments)

    def work() -> None:
        check_arguments(args)
        run(args, Console())

    return exit_code(work)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--root", type=Path, required=True, help="folder that contains the videos")
    found.add_argument("--list", type=Path, required=True, help="list file, csv, json, or folder of class folders")
    found.add_argument("--classes", type=Path, help="file with all class names in the order of their numbers")
    found.add_argument("--multilabel", action="store_true", help="a video may have any number of classes")
    found.add_argument("--write", type=Path, required=True, help="the manifest to write, .csv")
    found.add_argument("--transcode", type=Path, metavar="FOLDER", help="write copies to this folder, the new root")
    found.add_argument("--short-side", type=int, help="largest shorter side of the copies in pixels, e.g. 256 or 320")
    found.add_argument("--key-frames", type=int, default=12, help="frames from one key frame of a copy to the next")
    found.add_argument(
        "--workers", type=int, default=available_cores(), help="number of files that are decoded at once"
    )
    found.add_argument("--limit", type=float, default=600.0, help="seconds after which a file is skipped")
    found.add_argument("--checksum", action=argparse.BooleanOptionalAction, default=True, help="sha256 of every file")
    found.add_argument("--again", action="store_true", help="examine all files from scratch, e.g. with other settings")
    return found


def check_arguments(args: argparse.Namespace) -> None:
    """Raise a FewtokensError if the arguments are out of range or conflict."""
    check(args.workers >= 1, "--workers", "at least 1", args.workers)
    check(args.limit > 0, "--limit", "more than 0 seconds", args.limit)
    check(args.key_frames >= 1, "--key-frames", "at least 1", args.key_frames)
    check(args.short_side is None or args.short_side >= 16, "--short-side", "at least 16 pixels", args.short_side)
    if args.short_side is not None and args.transcode is None:
        raise FewtokensError(
            "--short-side scales the copies, but there are none. Add --transcode <folder> to write copies. Without "
            "copies, training scales the frames when it reads them."
        )
    if args.write.exists() and args.list.exists() and args.write.samefile(args.list):
        raise FewtokensError(f"--write would overwrite the list {args.list}. Choose another file.")


def run(args: argparse.Namespace, console: Console) -> None:
    """List the videos, prepare them with a progress bar, and print a report."""
    videos, classes = list_videos(args)
    settings = PrepareSettings(
        args.transcode, args.short_side, args.key_frames, args.checksum, args.limit, args.workers
    )
    counts = TextColumn("[green]{task.fields[good]} good[/] [red]{task.fields[skipped]} skipped")
    columns = (TextColumn("files"), BarColumn(), MofNCompleteColumn(), counts, TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:
        bar = bars.add_task("", total=None, good=0, skipped=0)

        def progress(good: int, skipped: int, total: int) -> None:
            bars.update(bar, total=total, completed=good + skipped, good=good, skipped=skipped)

        extra = {"classes": classes}
        summary = prepare(videos, args.root, args.write, settings, extra=extra, again=args.again, progress=progress)
    print_report(summary, args.write, console)
    if not summary["good"]:
        raise FewtokensError(
            f"None of the {summary['videos']} listed videos can be used; see the reasons above. "
            "Check that --root and --list belong to the same data set."
        )


def list_videos(args: argparse.Namespace) -> tuple[list[Video], list[str]]:
    """Return the listed videos and the class names. Videos of official annotations that have no file come last."""
    source = str(args.list.absolute() if args.list.exists() else args.list)
    given = None if args.classes is None else parts.read_classes(args.classes)
    videos, missing = parts.list_videos(args.root, source, multilabel=args.multilabel, classes=given)
    classes = parts.class_names(args.root, source, args.multilabel) if given is None else given
    return videos + missing, classes


def print_report(summary: dict[str, Any], file: Path, console: Console) -> None:
    """Print the first skipped videos with their reasons, and the totals."""
    skipped = [row for row in manifest.read(file) if row.reason is not None]
    for row in skipped[:_SHOWN]:
        path = os.fsencode(row.video.path).decode(errors="backslashreplace")
        console.print(f"skipped: {path}: {row.reason}", style="red", markup=False, highlight=False, soft_wrap=True)
    if len(skipped) > _SHOWN:
        console.print(f"... and {len(skipped) - _SHOWN} more: see the column reason of {file}")
    sizes = "{bytes_before:,} -> {bytes_after:,} bytes".format(**summary)
    console.print(
        f"{summary['good']} of {summary['videos']} videos are good, {summary['hours']:.2f} hours, {sizes}: {file}",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    sys.exit(main())
