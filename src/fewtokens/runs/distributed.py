"""One job, several processes: all agree on one run directory, and each runs that job only."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RUN_DIR, STAMP = "FEWTOKENS_RUN_DIR", "FEWTOKENS_STAMP"
OF_THE_LAUNCHER = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def started_by_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def agree_on_stamp() -> None:
    """Let all processes that torchrun or srun started use one time stamp, and only the first write Hydra's files.

    Every process composes the config by itself, so their clocks would name different run directories.
    """
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    slurm = int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_JOB_ID" in os.environ
    if not started_by_torchrun() and not slurm:
        return
    if STAMP not in os.environ:
        os.environ[STAMP] = f"slurm-{os.environ['SLURM_JOB_ID']}" if slurm else _stamp_over_store(rank)
    if rank > 0:
        sys.argv += ["hydra/job_logging=stdout"]


def _stamp_over_store(rank: int) -> str:
    """Rank 0's time, over the store that torchrun keeps for its workers."""
    from datetime import datetime, timedelta

    from torch.distributed import TCPStore

    stamp = f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return f"{os.environ['TORCHELASTIC_RUN_ID']}"  # the same for all ranks, if the user gave one
    store = TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=60)
    )
    key = f"fewtokens/stamp/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if rank == 0:
        store.set(key, stamp)
    return str(store.get(key).decode())


@contextmanager
def one_job(run_dir: Path, extra: list[str]) -> Iterator[None]:
    """Within it, child processes that Lightning starts run this very job, not the command line.

    Lightning repeats the command line for its children: in a sweep (`-m`) each child would run the whole sweep. Here
    they get the composed config instead, and the run directory. Afterwards nothing is left of it, so that the next job
    of a sweep starts afresh.

    Args:
        run_dir: Of the job; `config.yaml` in it is the composed config.
        extra: Overrides that the saved config does not hold.
    """
    if "LOCAL_RANK" in os.environ or started_by_torchrun():
        yield
        return
    argv = list(sys.argv)
    os.environ[RUN_DIR] = str(run_dir)
    sys.argv = [argv[0], "--config-path", str(run_dir), "--config-name", "config", "hydra/job_logging=stdout", *extra]
    try:
        yield
    finally:
        _leave_group()
        sys.argv = argv
        for name in (RUN_DIR, *OF_THE_LAUNCHER):
            os.environ.pop(name, None)


def override(key: str, value: str | None) -> str:
    """The override that adds a key which saved configs do not hold."""
    return f"+{key}=null" if value is None else f"+{key}='{value}'"


def _leave_group() -> None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
