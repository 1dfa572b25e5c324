"""Functions for another process that never return, crash, or print: the worst that native decoders do."""

import ctypes
import os
import signal
import sys
import time
from typing import Any

import numpy as np

from fewtokens.errors import FewtokensError

EXCLUSIVE = ctypes.PyDLL(None)  # its calls keep the interpreter's lock, so that no thread and no signal handler runs


def functions(allocate: Any) -> dict[str, Any]:
    def fill(size: int) -> int:
        allocate((size,))[:] = np.arange(size) % 251
        return os.getpid()

    def chatter() -> str:
        print("on standard output", flush=True)
        os.write(2, b"on standard error\n" * 1000)
        return "quiet"

    def refuse() -> None:
        raise FewtokensError("The rule is broken. Repair it.")

    return {
        "fill": fill,
        "chatter": chatter,
        "refuse": refuse,
        "crash": lambda: ctypes.string_at(0),
        "killed": lambda path: os.kill(os.getpid(), signal.SIGKILL),
        "leave": lambda: os._exit(3),
        "bug": lambda: 1 / 0,
        "spin": lambda: EXCLUSIVE.pause(),
        "hang": lambda path: EXCLUSIVE.pause(),
        "sleep": lambda seconds: time.sleep(seconds),
        "torch": lambda: "torch" in sys.modules,
    }
