"""One job in several processes: all use one run directory, and Lightning's child processes run only this job."""

import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig

from fewtokens.errors import first_line

if TYPE_CHECKING:  # Lightning takes seconds to import, and the command line imports this module first
    from lightning.pytorch import Trainer

log = logging.getLogger(__name__)
RESUME_AUTO = "resume=auto"
PR_SET_PDEATHSIG = 1  # of Linux's prctl
LOST = ("gloo", "nccl", "connection closed", "connection reset", "tcpstore")  # in errors of collective operations
SECONDS_TO_DIE = 3.0  # Lightning kills all processes of a job 5 seconds after one of them
RUN_DIR, TIMESTAMP = "FEWTOKENS_RUN_DIR", "FEWTOKENS_STAMP"  # configs/hydra/default.yaml reads them
LAUNCHER_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_rank_zero() -> bool:
    """Return whether this is the main process of the job. It can be called before Lightning has set anything up.

    No single variable tells: torchrun sets RANK and srun SLURM_PROCID, whereas processes that Lightning starts have
    only LOCAL_RANK, and inherit SLURM_PROCID=0 if their parent runs inside `srun --ntasks=1`.
    """
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def rank() -> str:
    """Return the rank of this process for a message. Of processes that Lightning started, it is the local rank."""
    variables = [os.environ[name] for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ]
    return next((value for value in variables if value != "0"), "0")


def started_by_torchrun() -> bool:
    """Return whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def share_timestamp() -> None:
    """Let all processes that torchrun or srun started use the same timestamp, and only rank 0 write Hydra's log file.

    Every process composes the config by itself, so that their own clocks would name different run directories.
    """
    if not started_by_torchrun() and not by_slurm():
        return
    if TIMESTAMP not in os.environ:
        os.environ[TIMESTAMP] = _slurm_name() if by_slurm() else _torchrun_timestamp()
    agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if agent_store and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        _leave_store_of_torchrun()
    if not is_rank_zero():
        sys.argv += ["hydra/job_logging=stdout"]


def by_slurm() -> bool:
    """Return whether the run directory has the number of the SLURM job as its name.

    It has if srun started several processes, and in every SLURM job with `resume=auto`, whose restarts must find it.
    """
    if "SLURM_JOB_ID" in os.environ and RESUME_AUTO in sys.argv:
        return True
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1")))
    return "SLURM_STEP_ID" in os.environ and tasks > 1 and not started_by_torchrun()


def _slurm_name() -> str:
    """Return a name that the processes of a job step share, and no other step has; restarts have it with auto."""
    names = [os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_STEP_ID")]
    name = "slurm-" + ".".join(name for name in names if name is not None)
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    return name if restarts == "0" or RESUME_AUTO in sys.argv else f"{name}-restart{restarts}"


def requeue() -> None:
    """Put the running SLURM job of this process, if there is one, back into the queue, from rank 0.

    A job that a user cancels or that SLURM preempts gets the same signals. It is not running any more, and SLURM itself
    puts it back, or not.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or not is_rank_zero():
        return
    try:
        state = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=True).stdout
        if "JobState=RUNNING" in state:
            log.warning("SLURM job %s goes back to the queue", job)
            subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        log.warning("SLURM job %s cannot be requeued: %s. Submit it again to continue", job, str(reason).strip())


def _torchrun_timestamp() -> str:
    """Return the time of rank 0, which it tells the others over torchrun's store."""
    from datetime import datetime

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return os.environ["TORCHELASTIC_RUN_ID"]  # the same in all processes, if the user has set it
    return _told_by_rank_zero("stamp", lambda: f"{datetime.now():%Y-%m-%d_%H-%M-%S}")


def _leave_store_of_torchrun() -> None:
    """After a restart, let rank 0 open a new store: torchrun keeps its own, with the addresses of dead processes."""

    def free_port() -> str:
        with socket.socket() as server:
            server.bind(("", 0))
            return str(server.getsockname()[1])

    os.environ["MASTER_PORT"] = _told_by_rank_zero("port", free_port)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"


def _told_by_rank_zero(name: str, value: Callable[[], str]) -> str:
    """Return a value of rank 0, over torchrun's store."""
    from datetime import timedelta

    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60))
    key = f"fewtokens/{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if is_rank_zero():
        store.set(key, value())
    return str(store.get(key).decode())


@contextmanager
def child_processes_run_this_job(run_dir: Path, trainer: "Trainer") -> Iterator[None]:
    """Return a context in which Lightning's child processes run the current job, in the same directory.

    Lightning starts them with the command line of this process. In a sweep (`-m`) each of them would run the whole
    sweep. At the end of the context the environment is as before, so that the next job of a sweep can start its own.

    Args:
        run_dir: Directory of the run.
        trainer: The trainer of the job. After an error, `end_children` must follow.
    """
    if "LOCAL_RANK" in os.environ or started_by_torchrun():
        yield
        return
    command, sys.argv = sys.argv, [sys.argv[0], *_job_arguments(sys.argv[1:])]
    os.environ[RUN_DIR] = str(run_dir)
    try:
        yield
    except BaseException:
        _leave_children_alone(trainer)
        raise
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


def end_with_parent() -> None:
    """On Linux, let a process that Lightning started be killed when rank 0 dies, which cannot end it any more."""
    if RUN_DIR in os.environ and os.environ.get("LOCAL_RANK", "0") != "0" and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end_children(trainer: "Trainer") -> None:
    """Wait for the processes that Lightning started for a job that has failed, and kill those that do not end."""
    until = time.monotonic() + SECONDS_TO_DIE
    for process in _children(trainer):
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def lost_process(trainer: "Trainer", error: BaseException) -> str | None:
    """Return a sentence about a process of the job that has died, or None if this is not what an error is about.

    Args:
        trainer: The trainer of this process.
        error: What ended this process. If another process dies, collective operations raise an error.
    """
    if trainer.world_size == 1 or not any(word in str(error).lower() for word in LOST):
        return None
    processes = _children(trainer)
    until = time.monotonic() + SECONDS_TO_DIE
    while processes and time.monotonic() < until and not any(process.poll() for process in processes):
        time.sleep(0.1)
    codes = {rank: process.returncode for rank, process in enumerate(processes, start=1) if process.returncode}
    killed = {rank: code for rank, code in codes.items() if code < 0}  # the others may have failed because of these
    for rank, code in (killed or codes).items():
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}, see above"
        memory = ", as by a system that is out of memory" if code == -signal.SIGKILL else ""
        return f"Rank {rank} (process {processes[rank - 1].pid}) {how}{memory}, and the others cannot go on without it."
    return (
        f"Rank {trainer.global_rank} has lost another process of the job, which torchrun or srun names with its exit "
        f"code: {first_line(error)}"
    )


def _children(trainer: "Trainer") -> list[subprocess.Popen[bytes]]:
    return getattr(trainer.strategy.launcher, "procs", [])


def _leave_children_alone(trainer: "Trainer") -> None:
    # Lightning's thread would kill this process within 5 seconds after one of them has failed, and with it the next
    # jobs of a sweep. It looks at the list that is emptied here.
    watched = _children(trainer)
    if watched:
        trainer.strategy.launcher.procs = list(watched)  # type: ignore[union-attr]
        watched.clear()


def _destroy_process_group() -> None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
