"""Commands of the project as processes of their own, which save when they are interrupted."""

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HOME = Path(__file__).parents[3]


def run_child(arguments: Sequence[str]) -> int:
    """Run Python with some arguments, and return its exit code.

    An interruption, by Ctrl-C or SIGTERM, makes it save at the next step, and is raised after that.

    Args:
        arguments: A script of the repository, or `-m` and a module, and their arguments.

    Raises:
        KeyboardInterrupt: The command was interrupted.
    """
    # A signal that arrives while the child process starts must still be passed on to it, and is raised below.
    received: list[int] = []
    handlers = {n: signal.signal(n, lambda number, _: received.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    # In its own session the child does not receive Ctrl-C, which would lose the epoch. On SIGTERM it saves.
    script = [str(HOME / arguments[0]), *arguments[1:]] if arguments[0].endswith(".py") else arguments
    child = subprocess.Popen([sys.executable, *script], start_new_session=True)
    try:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if received:
            raise KeyboardInterrupt
        return child.wait()
    except KeyboardInterrupt:
        child.send_signal(signal.SIGTERM)
        child.wait()
        raise
