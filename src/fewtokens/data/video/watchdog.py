"""Functions in a process of their own, which can be given up: no file makes a run hang or crash.

A decoder that loops in native code holds the interpreter's lock, so nothing inside its process can stop it. Every
DataLoader worker therefore owns one lean process that decodes for it. The kernel's timer ends that process when a call
takes too long, whatever it is doing; the worker sees the closed line, names the file and starts another one. Arrays
come in shared memory: a call costs two messages of a hundred bytes, and the worker sleeps while its process computes,
so that a core still does the work of one.
"""

import importlib
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from fewtokens.errors import FewtokensError

_GRACE = 10.0  # seconds more for a process that not even the kernel can end: one that waits for a dead file server
_START = 120.0  # seconds, for imports
Allocate = Callable[[tuple[int, ...]], UInt8[np.ndarray, "..."]]
Functions = dict[str, Callable[..., Any]]


class CallAborted(Exception):  # noqa: N818  # what was asked for may be right, so this is no error yet
    """The process ended in the middle of a call; the text says why."""


class WatchedProcess:
    """Calls functions in another process, started at the first call, and anew in every process that has a copy.

    Args:
        module: Its `functions(allocate)` returns what can be called, by name: arguments and results are plain values
            (JSON). `allocate(shape)` gives memory that this side sees as `memory(shape)`.
        limit: Seconds that a call may take.
    """

    def __init__(self, module: str, limit: float) -> None:
        if os.name != "posix":
            raise FewtokensError(
                "Videos are decoded in a process that a timer of the system can end",
                expected="Linux or macOS",
                got=sys.platform,
                fix="use one of them, or Linux inside Windows (WSL)",
            )
        self.module, self.limit = module, limit
        self._owner = 0
        self._process: subprocess.Popen | None = None
        self._memory: mmap.mmap | None = None

    def call(self, name: str, **arguments: Any) -> Any:
        """The result of a function.

        Raises:
            CallAborted: It took too long, or crashed.
            FewtokensError: As raised there.
        """
        if self._process is None or self._owner != os.getpid():  # a forked copy must not talk on the same line
            self._start()
        try:
            request = {"name": name, "arguments": arguments, "limit": self.limit}
            self._line.send_bytes(json.dumps(request).encode())
            if not self._line.poll(self.limit + _GRACE):
                raise EOFError
            answer = json.loads(self._line.recv_bytes())
        except (EOFError, OSError):
            raise CallAborted(self._end()) from None
        except BaseException:  # interrupted: the answer is still to come, and must not be taken for the next one
            self._end()
            raise
        if "error" in answer:
            raise FewtokensError(answer["error"])
        return answer["result"]

    def memory(self, shape: tuple[int, ...]) -> UInt8[np.ndarray, "..."]:
        """What the last call put into shared memory; the next one overwrites it."""
        self._memory = _mapped(self._file, int(np.prod(shape)), self._memory)
        return np.frombuffer(self._memory, np.uint8, int(np.prod(shape))).reshape(shape)

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None and self._owner == os.getpid():
            self._end()

    def interrupt(self) -> None:
        """Ends the process from another thread: a call that is waited for raises CallAborted there."""
        if (process := self._process) is not None:
            process.kill()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_line": None, "_owner": 0, "_process": None, "_memory": None}

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.close()

    def _start(self) -> None:
        mine, other = socket.socketpair()
        self._line, self._file = Connection(mine.detach()), _unnamed_file()
        self._memory, self._owner = None, os.getpid()
        with other:
            ends = (other.fileno(), self._file)
            # -P: a file in the working directory must not be taken for a module of that name.
            command = [sys.executable, "-P", "-m", __name__, self.module, *map(str, ends)]
            source = str(Path(__file__).parents[3])  # the package may be on this process's own path only
            path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
            environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(command, pass_fds=ends, stdin=subprocess.DEVNULL, env=environment)
        if not self._line.poll(_START) or not _ready(self._line):
            self._end()
            raise FewtokensError(
                "Videos are decoded in a process of their own",
                expected="that it starts",
                got="it ended; its own message stands above",
                fix="mend what the message says; python -c 'import av, numpy' should work",
            )

    def _end(self) -> str:
        """Ends the process and says why it had ended already, if it had."""
        process, self._process = self._process, None
        assert process is not None
        self._line.close()
        os.close(self._file)
        try:
            code = process.wait(0.5)  # without its line it ends by itself
        except subprocess.TimeoutExpired:
            process.kill()
            code = -signal.SIGALRM
        if code == -signal.SIGALRM:
            return f"timed out after {self.limit:g} s"
        return f"the decoder crashed ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"


def _unnamed_file() -> int:
    if hasattr(os, "memfd_create"):  # memory that is not counted against /dev/shm, which is small in containers
        return os.memfd_create("fewtokens")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _mapped(file: int, size: int, before: mmap.mmap | None) -> mmap.mmap:
    """The file in memory, at least `size` bytes of it, made longer if need be."""
    if before is not None and len(before) >= size:
        return before
    if os.fstat(file).st_size < size:
        os.ftruncate(file, size)
    return mmap.mmap(file, size)


def _ready(line: Connection) -> bool:
    try:
        return line.recv_bytes() == b"ready"
    except EOFError:
        return False


def _answer(functions: Functions, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"result": functions[request["name"]](**request["arguments"])}
    except FewtokensError as error:
        return {"error": str(error)}


def main() -> None:
    """Answers calls until the line is closed; ended by the kernel when a call exceeds its limit."""
    module, line, file = sys.argv[1], Connection(int(sys.argv[2])), int(sys.argv[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the business of the run, which then closes the line
    memory: mmap.mmap | None = None

    def allocate(shape: tuple[int, ...]) -> np.ndarray:
        nonlocal memory
        memory = _mapped(file, int(np.prod(shape)), memory)
        return np.frombuffer(memory, np.uint8, int(np.prod(shape))).reshape(shape)

    functions = importlib.import_module(module).functions(allocate)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)  # decoders print a line for every broken frame; what matters is raised
    line.send_bytes(b"ready")
    while True:
        try:
            request = json.loads(line.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)  # decord can crash on the way out of the interpreter
        signal.setitimer(signal.ITIMER_REAL, request["limit"])
        answer = _answer(functions, request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        line.send_bytes(json.dumps(answer).encode())


if __name__ == "__main__":
    main()
