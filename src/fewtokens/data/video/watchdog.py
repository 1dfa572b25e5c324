"""Functions that run in a process of their own, with a time limit, so that no file can block or crash a run.

A decoder that loops in native code holds the interpreter's lock, so nothing inside its process can stop it. Every
DataLoader worker therefore owns one small process that decodes for it. If a call exceeds its time limit, a kernel timer
ends that process, whatever it is doing; the worker sees the closed connection, reports the file, and starts another
process. Arrays are passed in shared memory, so that a call costs two messages of about a hundred bytes. The worker
sleeps while its process computes, so both together need one core.
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

from fewtokens.data.workers import SIGNALS
from fewtokens.errors import FewtokensError

_GRACE = 10.0  # extra seconds for a process that even the kernel cannot end, as it waits for a dead file server
_START_LIMIT = 120.0  # seconds, for imports
Allocate = Callable[[tuple[int, ...]], UInt8[np.ndarray, "..."]]
Functions = dict[str, Callable[..., Any]]


class CallAborted(Exception):  # noqa: N818  # the arguments of the call may be right, so this is not an error yet
    """The process ended during a call. The message says why.

    Args:
        reason: Why the process ended.
        killed: Whether it was killed from outside, for example by the kernel when memory ran out.
    """

    def __init__(self, reason: str, killed: bool = False) -> None:
        super().__init__(reason)
        self.killed = killed


class WatchedProcess:
    """Calls functions in another process, which is started by the first call, in every process that has a copy of this.

    Args:
        module: Module whose `functions(allocate)` returns the functions by name. Their arguments and results must be
            JSON values. `allocate(shape)` returns memory that this side reads with `memory(shape)`.
        limit: Seconds that a call may take.

    Raises:
        FewtokensError: The operating system is not POSIX.
    """

    def __init__(self, module: str, limit: float) -> None:
        if os.name != "posix":
            raise FewtokensError(
                f"Videos can be decoded on Linux and macOS only, not on {sys.platform}, as the time limit needs a "
                "POSIX timer. On Windows, use the Windows Subsystem for Linux (WSL)."
            )
        self.module, self.limit = module, limit
        self._owner = 0
        self._process: subprocess.Popen | None = None
        self._memory: mmap.mmap | None = None
        self._interrupted = False

    def call(self, name: str, **arguments: Any) -> Any:
        """Call a function and return its result.

        Raises:
            CallAborted: The call exceeded the time limit, or the process ended.
            FewtokensError: As raised by the function.
        """
        if self._process is None or self._owner != os.getpid():  # a forked copy must not use the same connection
            self._start()
        try:
            request = {"name": name, "arguments": arguments, "limit": self.limit}
            self._connection.send_bytes(json.dumps(request).encode())
            if not self._connection.poll(self.limit + _GRACE):
                raise EOFError
            answer = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            raise self._end() from None
        except BaseException:  # interrupted: the answer is still to come and must not be taken for the next one
            self._end()
            raise
        if "error" in answer:
            raise FewtokensError(answer["error"])
        return answer["result"]

    def memory(self, shape: tuple[int, ...]) -> UInt8[np.ndarray, "..."]:
        """Return the shared memory that the last call filled. It is valid until the next call."""
        self._memory = _map(self._file, int(np.prod(shape)), self._memory)
        return np.frombuffer(self._memory, np.uint8, int(np.prod(shape))).reshape(shape)

    def close(self) -> None:
        """End the process if this object started one."""
        if self._process is not None and self._owner == os.getpid():
            self._end()

    def interrupt(self) -> None:
        """Kill the process from another thread. A call that is in progress raises `CallAborted` there."""
        if (process := self._process) is not None:
            self._interrupted = True
            process.kill()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_connection": None, "_owner": 0, "_process": None, "_memory": None}

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.close()

    def _start(self) -> None:
        mine, other = socket.socketpair()
        self._connection, self._file = Connection(mine.detach()), _unnamed_file()
        self._memory, self._owner, self._interrupted = None, os.getpid(), False
        with other:
            ends = (other.fileno(), self._file)
            # -P: a file in the working directory must not be imported instead of a module of the same name.
            command = [sys.executable, "-P", "-m", __name__, self.module, *map(str, ends)]
            source = str(Path(__file__).parents[3])  # the package may be importable in this process only
            path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
            environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(command, pass_fds=ends, stdin=subprocess.DEVNULL, env=environment)
        if not self._connection.poll(_START_LIMIT) or not _is_ready(self._connection):
            self._end()
            raise FewtokensError(
                "The process that decodes videos ended when it started, for the reason printed above. "
                "`python -c 'import av, numpy'` must work."
            )

    def _end(self) -> CallAborted:
        """End the process, and return the reason if it had ended already."""
        process, self._process = self._process, None
        assert process is not None
        self._connection.close()
        os.close(self._file)
        try:
            code = process.wait(0.5)  # it exits by itself when the connection is closed
        except subprocess.TimeoutExpired:
            process.kill()
            code = -signal.SIGALRM
        if code == -signal.SIGALRM:
            return CallAborted(f"timed out after {self.limit:g} s")
        if code == -signal.SIGKILL:
            reason = "the decoder process was killed (SIGKILL), for example because memory ran out"
            return CallAborted(reason, killed=not self._interrupted)
        return CallAborted(f"the decoder crashed ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})")


def _unnamed_file() -> int:
    if hasattr(os, "memfd_create"):  # not counted against /dev/shm, which is small in containers
        return os.memfd_create("fewtokens")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _map(file: int, size: int, before: mmap.mmap | None) -> mmap.mmap:
    """Map at least `size` bytes of a file into memory, and enlarge the file if necessary."""
    if before is not None and len(before) >= size:
        return before
    if os.fstat(file).st_size < size:
        os.ftruncate(file, size)
    return mmap.mmap(file, size)


def _is_ready(connection: Connection) -> bool:
    try:
        return connection.recv_bytes() == b"ready"
    except EOFError:
        return False


def _answer(functions: Functions, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"result": functions[request["name"]](**request["arguments"])}
    except FewtokensError as error:
        return {"error": str(error)}


def main() -> None:
    """Answer calls until the connection is closed. The kernel ends the process when a call exceeds its limit."""
    module, connection, file = sys.argv[1], Connection(int(sys.argv[2])), int(sys.argv[3])
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the run handles them, and closes the connection
    memory: mmap.mmap | None = None

    def allocate(shape: tuple[int, ...]) -> np.ndarray:
        nonlocal memory
        memory = _map(file, int(np.prod(shape)), memory)
        return np.frombuffer(memory, np.uint8, int(np.prod(shape))).reshape(shape)

    functions = importlib.import_module(module).functions(allocate)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)  # decoders print a line for every broken frame; relevant errors are raised
    connection.send_bytes(b"ready")
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)  # decord can crash when the interpreter shuts down
        signal.setitimer(signal.ITIMER_REAL, request["limit"])
        answer = _answer(functions, request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send_bytes(json.dumps(answer).encode())


if __name__ == "__main__":
    main()
