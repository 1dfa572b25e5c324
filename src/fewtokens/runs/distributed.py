"""One job in several processes: all use one run directory, and Lightning's child processes run only this job."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig

if TYPE_CHECKING:  # Lightning takes seconds to import, and the command line imports this module first
    from lightning.pytorch import Trainer

RUN_DIR, TIMESTAMP = "FEWTOKENS_RUN_DIR", "FEWTOKENS_STAMP"  # configs/hydra/default.yaml reads them
LAUNCHER_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_rank_zero() -> bool:
    """Return whether this is the main process of the job. It can be called before Lightning has set anything up.

    No single variable tells: torchrun sets RANK and srun SLURM_PROCID, whereas processes that Lightning starts have
    only LOCAL_RANK, and inherit SLURM_PROCID=0 if their parent runs inside `srun --ntasks=1`.
    """
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def started_by_torchrun() -> bool:
    """Return whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def share_timestamp() -> None:
    """Let all processes that torchrun or srun started use the same timestamp, and only rank 0 write Hydra's log file.

    Every process composes the config by itself, so that their own clocks would name different run directories.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1")))
    by_srun = "SLURM_STEP_ID" in os.environ and tasks > 1
    if not started_by_torchrun() and not by_srun:
        return
    if TIMESTAMP not in os.environ:
        os.environ[TIMESTAMP] = _torchrun_timestamp() if started_by_torchrun() else _slurm_name()
    if not is_rank_zero():
        sys.argv += ["hydra/job_logging=stdout"]


def _slurm_name() -> str:
    """Return a name that the processes of a job step share, and no other step or restart has."""
    name = f"slurm-{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    return name if restarts == "0" else f"{name}-restart{restarts}"


def _torchrun_timestamp() -> str:
    """Return the time of rank 0, which it tells the others over torchrun's store."""
    from datetime import datetime, timedelta

    from torch.distributed import TCPStore

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return os.environ["TORCHELASTIC_RUN_ID"]  # the same in all processes, if the user has set it
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60))
    key = f"fewtokens/stamp/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if is_rank_zero():
        store.set(key, f"{datetime.now():%Y-%m-%d_%H-%M-%S}")
    return str(store.get(key).decode())


@contextmanager
def child_processes_run_this_job(run_dir: Path) -> Iterator[None]:
    """Return a context in which Lightning's child processes run the current job, in the same directory.

    Lightning starts them with the command line of this process. In a sweep (`-m`) each of them would run the whole
    sweep. At the end of the context the environment is as before, so that the next job of a sweep can start its own.

    Args:
        run_dir: Directory of the run.
    """
    if "LOCAL_RANK" in os.environ or started_by_torchrun():
        yield
        return
    command, sys.argv = sys.argv, [sys.argv[0], *_job_arguments(sys.argv[1:])]
    os.environ[RUN_DIR] = str(run_dir)
    try:
        yield
    finally:
        _destroy_process_group()
        sys.argv = command
        for name in (RUN_DIR, *LAUNCHER_VARIABLES):
            os.environ.pop(name, None)


def _job_arguments(arguments: list[str]) -> list[str]:
    """Return the arguments that compose the config of the current job, which may be one of a sweep."""
    args, overrides = get_args_parser().parse_known_args(arguments)[0], HydraConfig.get().overrides
    flags = [f"--{name.replace('_', '-')}={value}" for name in ("config_path", "config_name", "config_dir")
             if (value := getattr(args, name)) is not None]  # fmt: skip
    of_hydra = [override for override in overrides.hydra if not override.startswith("hydra.mode=")]
    return [*flags, *of_hydra, *overrides.task, "hydra/job_logging=stdout"]


def end_process_group(trainer: "Trainer") -> None:
    """Wait for all processes of the job and end their group, before rank 0 does something for long that others do not.

    The others can then exit. Without a group, there is neither a collective operation that could wait for them, nor a
    watchdog that could end rank 0.

    Args:
        trainer: The trainer of the job, which must not be used for training or testing after this.
    """
    trainer.strategy.barrier()
    _destroy_process_group()


def _destroy_process_group() -> None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
