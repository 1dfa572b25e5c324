"""Worker processes of data loaders, which leave signals to the process that they load for."""

import os
import signal
import threading


def leave_signals_to_parent(worker: int | None = None) -> None:
    """Let this process ignore the signals that stop a run, unless its parent sends them.

    A terminal, SLURM and systemd send signals to all processes of a job. The main process saves at the end of the step
    and then ends its workers; a worker that has ended before would make the run fail without saving. If the main
    process is killed, torch's workers notice it and end.

    Args:
        worker: Index of the worker, which DataLoader passes and nothing depends on.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where SIGTERM to all processes still ends the workers
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for, args=(os.getppid(),), daemon=True).start()


def _end_for(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
