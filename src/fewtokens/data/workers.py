"""Worker processes of data loaders, which leave signals to the process that they load for."""

import os
import re
import signal
import threading

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # that stop a run, after it has saved
# What torch says of a worker that has ended, and what ends one.
LOST = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([\w ]+)|exited unexpectedly)"
)
CAUSES = {
    "Killed": ", as by a system that is out of memory. Lower data.num_workers or data.batch_size.",
    "Bus error": ", as when shared memory (/dev/shm) is full. Enlarge it, as with docker run --shm-size=8g, or lower "
    "data.num_workers.",
}


def leave_signals_to_parent(worker: int | None = None) -> None:
    """Let this process ignore the signals that stop a run, unless its parent sends them.

    A terminal, SLURM and systemd send signals to all processes of a job. The main process saves at the end of the step
    and then ends its workers; a worker that has ended before would make the run fail without saving. If the main
    process is killed, torch's workers notice it and end.

    Args:
        worker: Index of the worker, which DataLoader passes and nothing depends on.
    """
    for number in SIGNALS:
        if number != signal.SIGTERM:  # by which the parent ends it
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where SIGTERM to all processes still ends the workers
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for, args=(os.getppid(),), daemon=True).start()


def _end_for(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def lost_worker(error: BaseException) -> str | None:
    """Return a sentence about a worker that has ended, or None if this is not what an error is about."""
    found = LOST.search(str(error))
    if found is None:
        return None
    if found[2] is None:
        often = "Often memory has run out: lower data.num_workers or data.batch_size."
        return f"A process that loads data ({found[1]}) has ended, see above. {often}"
    return f"A process that loads data ({found[1]}) was ended ({found[2].lower()}){CAUSES.get(found[2], '.')}"
