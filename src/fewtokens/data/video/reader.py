"""Reader of video files that decodes in another process, so that a file can neither block nor crash this one."""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from fewtokens.data.video.records import UnreadableError, VideoInfo, require_decoder
from fewtokens.data.video.watchdog import Allocate, CallAborted, Functions, WatchedProcess
from fewtokens.errors import FewtokensError, check, write_error

log = logging.getLogger(__name__)
PARTIAL_SUFFIX = ".part.mp4"  # of the name of a copy while it is written


class Reader:
    """Calls `fewtokens.data.video.container` and `decoders` in another process with a time limit.

    Args:
        decoder: "decord", "torchcodec" or "pyav".
        limit: Seconds that one call may take.

    Raises:
        FewtokensError: The decoder is unknown or not installed, or the limit is not positive.
    """

    def __init__(self, decoder: str = "pyav", limit: float = 60.0) -> None:
        require_decoder(decoder)
        check(limit > 0, "data.decode_limit", "a number of seconds > 0", limit)
        self.decoder, self.process = decoder, WatchedProcess(__name__, float(limit))

    def video_info(self, path: str) -> VideoInfo:
        """Return the properties of a file.

        Raises:
            UnreadableError: The number of frames cannot be determined.
        """
        return VideoInfo(**self._call("video_info", path))

    def frame_range(self, path: str, start: float | None, end: float | None) -> tuple[int, int]:
        """Return the first frame of a section and the number of its frames; see `container.frame_range`.

        Raises:
            UnreadableError: The section contains no frame.
        """
        first, count = self._call("frame_range", path, start=start, end=end)
        return first, count

    def read(
        self, path: str, indices: Sequence[int], short_side: int | None = None, info: VideoInfo | None = None
    ) -> UInt8[np.ndarray, "t 3 h w"]:
        """Return frames as `decoders.read` does. The array is valid until the next call, which reuses its memory."""
        arguments = {"info": None if info is None else asdict(info), "short_side": short_side, "decoder": self.decoder}
        shape = self._call("read", path, indices=[int(index) for index in indices], **arguments)
        return self.process.memory(tuple(shape)).transpose(0, 3, 1, 2)

    def examine(
        self,
        path: str,
        target: str | None,
        *,
        start: float | None,
        end: float | None,
        short_side: int | None,
        key_frames: int,
    ) -> VideoInfo:
        """Decode a whole file and copy a section of it to `target`; see `fewtokens.data.video.transcode.examine`.

        The copy appears at `target` only when it is complete and was checked.

        Raises:
            UnreadableError: The file cannot be decoded completely.
            FewtokensError: The copy cannot be written.
        """
        arguments = {"start": start, "end": end, "short_side": short_side, "key_frames": key_frames}
        if target is None:
            return VideoInfo(**self._call("examine", path, target=None, **arguments))
        if os.path.exists(target) and os.path.exists(path) and os.path.samefile(path, target):
            raise FewtokensError(f"The copy {target} would overwrite its original. Choose another folder for copies.")
        part = Path(target).with_name(f".{os.getpid()}-{threading.get_ident()}{PARTIAL_SUFFIX}")
        try:
            found = VideoInfo(**self._call("examine", path, target=str(part), **arguments))
            os.replace(part, target)
        except OSError as error:
            raise write_error(target, error) from error
        finally:
            with suppress(OSError):
                part.unlink()
        return found

    def close(self) -> None:
        """End the process."""
        self.process.close()

    def _call(self, name: str, path: str, **arguments: Any) -> Any:
        try:
            try:
                result, reason = self.process.call(name, path=path, **arguments)
            except CallAborted as aborted:
                if not aborted.killed:
                    raise
                # Memory that ran out says nothing about the file, which is probably read at the second attempt.
                log.warning("%s: %s. Trying once more", path, aborted)
                result, reason = self.process.call(name, path=path, **arguments)
        except CallAborted as aborted:
            raise UnreadableError(path, str(aborted)) from None
        if reason is not None:
            raise UnreadableError(path, reason)
        return result


def functions(allocate: Allocate) -> Functions:
    """Return the functions of the other process. Each returns its result and, if there is none, the reason.

    The decoders are imported here, in the other process only. Nothing that this module imports loads torch, so that the
    process is small and starts fast.
    """
    from fewtokens.data.video import container, decoders, transcode

    def read(path: str, info: dict[str, Any] | None, **arguments: Any) -> tuple[int, ...]:
        known = None if info is None else VideoInfo(**info)
        t, c, h, w = decoders.read(path, info=known, allocate=allocate, **arguments).shape
        return t, h, w, c

    def video_info(path: str) -> dict[str, Any]:
        return asdict(container.video_info(path))

    def examine(**arguments: Any) -> dict[str, Any]:
        return asdict(transcode.examine(**arguments))

    calls = (video_info, container.frame_range, read, examine)
    return {function.__name__: _with_reason(function) for function in calls}


def _with_reason(function: Callable[..., Any]) -> Callable[..., tuple[Any, str | None]]:
    def call(**arguments: Any) -> tuple[Any, str | None]:
        try:
            return function(**arguments), None
        except UnreadableError as error:
            return None, error.reason
        except FewtokensError:
            raise
        except Exception as error:  # a bad file must not end a run, whatever error a decoder raises
            return None, f"{type(error).__name__}: {error}"

    return call
