"""The exit code of the commands that write a data set and continue where they were stopped."""

import signal
import sys
from collections.abc import Callable

from fewtokens.errors import FewtokensError


def exit_code(work: Callable[[], None]) -> int:
    """Call a function that continues where its last call was stopped, and return the exit code of its command.

    SIGTERM stops it as Ctrl-C does.
    """
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        work()
    except FewtokensError as error:
        print(f"Error: {error}".encode(errors="backslashreplace").decode(), file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print("Stopped. The same command continues from here.", file=sys.stderr)
        return 128 + (error.args[0] if error.args else signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)
