"""What a run on videos could not read, and what its accuracy means then."""

import csv
import logging

import torch.distributed as dist

from fewtokens.data.video.datamodule import LeftOut, Videos
from fewtokens.errors import FewtokensError
from fewtokens.runs.job import Job

log = logging.getLogger(__name__)


def account(job: Job, numbers: dict[str, float]) -> dict[str, float]:
    """Gather from all processes what was left out, and write `left_out.csv` in the run directory if there is anything.

    Args:
        job: On any data; only videos leave something out.
        numbers: Of the test, if there was one.

    Returns:
        `data/<part>_left_out`, `data/train_replaced` (samples that another video stood in for) and, after a test,
        `test/videos` and `test/left_out`; where a video was left out, `test/top1_of_listed`, which counts it as wrong,
        while `test/top1` is over those that were read.

    Raises:
        FewtokensError: No video of the test could be read.
    """
    if not isinstance(job.data, Videos):
        return {}
    mine = (job.data.left_out, job.data.replaced, job.data.tested, job.data.untested)
    processes = [mine]
    if dist.is_available() and dist.is_initialized():
        processes = [mine] * dist.get_world_size()
        dist.all_gather_object(processes, mine)
    records = sorted({record for left_out, *_ in processes for record in left_out})
    replaced, tested, unread = (float(sum(process[i] for process in processes)) for i in (1, 2, 3))
    found = {f"data/{part}_left_out": float(sum(r.part == part for r in records)) for part in ("train", "val", "test")}
    found = {name: count for name, count in found.items() if count}
    if replaced:
        found["data/train_replaced"] = replaced
    if records and job.trainer.is_global_zero:
        _write(job, records)
    if any(name.startswith("test/") for name in numbers):
        found |= _tested(tested, unread + job.data.refused("test"), numbers)
    return found


def _tested(read: float, left_out: float, numbers: dict[str, float]) -> dict[str, float]:
    if not read:
        raise FewtokensError(
            "A test part has videos that can be read",
            expected="at least one",
            got=f"none of {left_out:.0f}; left_out.csv in the run directory names them",
            fix="look at data.root and data.parts.test; python -m fewtokens.data.prepare says what is wrong with files",
        )
    found = {"test/videos": read, "test/left_out": left_out}
    if left_out and "test/top1" in numbers:
        found["test/top1_of_listed"] = numbers["test/top1"] * read / (read + left_out)
    if left_out:
        counted = (
            "Test figures are over the videos that were read: %d. Left out: %d; test/top1_of_listed counts them wrong"
        )
        log.warning(counted, read, left_out)
    return found


def _write(job: Job, records: list[LeftOut]) -> None:
    path = job.directory / "left_out.csv"
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(LeftOut._fields)
        writer.writerows(records)
    log.warning("Videos left out: %d, each named with its reason in %s", len(records), path)
