"""Report of the videos or pictures that a run could not read, and of its accuracy if they count as wrong."""

import csv
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

from fewtokens.data.skipped import Skipped
from fewtokens.data.unreadable import ReplacingDataModule, UnreadableInARowError
from fewtokens.data.video.datamodule import Videos
from fewtokens.errors import FewtokensError
from fewtokens.files import replace_file
from fewtokens.runs.job import Job

log = logging.getLogger(__name__)


@contextmanager
def written_on_failure(job: Job) -> Iterator[None]:
    """Return a context for training and test, at whose failure or stop the skipped videos are written nevertheless.

    The processes cannot gather them then, since the others may have ended: process 0 writes its own to `skipped.csv`,
    and process r to `skipped.<r>.csv`.

    Args:
        job: The run.
    """
    try:
        yield
    except BaseException as error:
        last = error.skipped if isinstance(error, UnreadableInARowError) else []
        skipped = sorted({*job.data.skipped, *last}) if isinstance(job.data, ReplacingDataModule) else []
        rank = job.trainer.global_rank
        if skipped:
            with suppress(FewtokensError):  # the error that ended the run is the one to report
                _write(job.directory / (f"skipped.{rank}.csv" if rank else "skipped.csv"), skipped)
        raise


def summarize(job: Job, numbers: dict[str, float]) -> dict[str, float]:
    """Gather the skipped samples from all processes, write them to `skipped.csv` in the run directory, and count them.

    Args:
        job: The run. Only runs on videos or on pictures of any size skip anything.
        numbers: Results of the test; without any that start with `test/`, there was no test.

    Returns:
        `data/<part>_skipped`, `data/train_replaced` (samples for which another was used) and, after a test on videos,
        `test/videos` and `test/skipped`. If videos were skipped, also `test/top1_of_listed`, which counts them as
        wrong, whereas `test/top1` is the accuracy on those that were read.

    Raises:
        FewtokensError: No video of the test could be read.
    """
    if not isinstance(job.data, ReplacingDataModule):
        return {}
    mine = (job.data.skipped, job.data.replaced, job.data.tested, job.data.untested)
    processes = [mine]
    if dist.is_available() and dist.is_initialized():
        processes = [mine] * dist.get_world_size()
        dist.all_gather_object(processes, mine)
    skipped = sorted({video for videos, *_ in processes for video in videos})
    replaced, tested, untested = (float(sum(process[i] for process in processes)) for i in (1, 2, 3))
    counts = {f"data/{part}_skipped": float(sum(v.part == part for v in skipped)) for part in ("train", "val", "test")}
    counts = {name: count for name, count in counts.items() if count}
    if replaced:
        counts["data/train_replaced"] = replaced
    if skipped and job.trainer.is_global_zero:
        _write(job.directory / "skipped.csv", skipped)
    if isinstance(job.data, Videos) and any(name.startswith("test/") for name in numbers):
        counts |= _test_numbers(tested, untested + job.data.skipped_at_setup("test"), numbers)
    return counts


def _test_numbers(read: float, skipped: float, numbers: dict[str, float]) -> dict[str, float]:
    if not read:
        raise FewtokensError(
            f"None of the {skipped:.0f} test videos can be read; skipped.csv in the run directory gives the reasons. "
            "Check `data.root` and `data.parts.test`."
        )
    found = {"test/videos": read, "test/skipped": skipped}
    if skipped and "test/top1" in numbers:
        found["test/top1_of_listed"] = numbers["test/top1"] * read / (read + skipped)
    if skipped:
        log.warning(
            "Test results are over the %d videos that were read, without the %d skipped; test/top1_of_listed "
            "counts the skipped ones as wrong",
            read,
            skipped,
        )
    return found


def _write(path: Path, skipped: list[Skipped]) -> None:
    with replace_file(path, newline="", errors="surrogateescape") as file:
        # All fields are quoted, since csv.writer does not quote a carriage return in a file name by itself.
        writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writerow(Skipped._fields)
        writer.writerows(skipped)
    log.warning("Skipped samples: %d. The reasons are in %s", len(skipped), path)
