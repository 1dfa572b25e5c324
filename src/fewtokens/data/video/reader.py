"""Reads video files from another process, so that one that hangs or crashes its decoder is only a bad file."""

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
from fewtokens.errors import FewtokensError, write_error

PARTIAL_SUFFIX = ".part.mp4"  # at the end of the name of a copy that is being made


class Reader:
    """The functions of `fewtokens.data.video.decoders` under a time limit.

    Args:
        decoder: "decord", "torchcodec" or "pyav".
        limit: Seconds that reading a clip may take.

    Raises:
        FewtokensError: The decoder is unknown or not installed.
    """

    def __init__(self, decoder: str = "pyav", limit: float = 60.0) -> None:
        require_decoder(decoder)
        if limit <= 0:
            raise FewtokensError(
                "A decoder is given up after a time",
                expected="more than 0 s",
                got=limit,
                fix="set data.decode_limit=60",
            )
        self.decoder, self.process = decoder, WatchedProcess(__name__, float(limit))

    def video_info(self, path: str) -> VideoInfo:
        """What there is to know of a file; UnreadableError if its frames cannot be found."""
        return VideoInfo(**self._call("video_info", path))

    def frame_range(self, path: str, start: float | None, end: float | None) -> tuple[int, int]:
        """First frame and number of frames between two times in seconds; UnreadableError if there is none."""
        first, count = self._call("frame_range", path, start=start, end=end)
        return first, count

    def read(
        self, path: str, indices: Sequence[int], short_side: int | None = None, info: VideoInfo | None = None
    ) -> UInt8[np.ndarray, "t 3 h w"]:
        """Frames as `decoders.read` gives them, valid until the next call: the memory is used again."""
        given = None if info is None else asdict(info)
        wanted = [int(index) for index in indices]
        shape = self._call("read", path, indices=wanted, decoder=self.decoder, short_side=short_side, info=given)
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
        """Decodes a whole file, copies a part of it to `target`: `fewtokens.data.prepare.transcode.examine`.

        The copy appears at once and checked, or not at all.

        Raises:
            UnreadableError: Something is wrong with the file.
            FewtokensError: The copy cannot be written.
        """
        arguments = {"start": start, "end": end, "short_side": short_side, "key_frames": key_frames}
        if target is None:
            return VideoInfo(**self._call("examine", path, target=None, **arguments))
        if os.path.exists(target) and os.path.exists(path) and os.path.samefile(path, target):
            raise FewtokensError(
                "The originals are never touched",
                expected="a copy elsewhere",
                got=f"{target} for itself",
                fix="name another folder for the copies",
            )
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
        """Ends the process."""
        self.process.close()

    def _call(self, name: str, path: str, **arguments: Any) -> Any:
        try:
            result, reason = self.process.call(name, path=path, **arguments)
        except CallAborted as ended:
            raise UnreadableError(path, str(ended)) from None
        if reason is not None:
            raise UnreadableError(path, reason)
        return result


def functions(allocate: Allocate) -> Functions:
    """For the other process, which alone loads decoders: every function returns its result or why there is none.

    Nothing that this file imports loads torch, so that the process is lean and there at once.
    """
    from fewtokens.data.prepare import transcode as transcoding
    from fewtokens.data.video import container, decoders

    def read(path: str, info: dict[str, Any] | None, **arguments: Any) -> tuple[int, ...]:
        given = None if info is None else VideoInfo(**info)
        t, c, h, w = decoders.read(path, info=given, allocate=allocate, **arguments).shape
        return t, h, w, c

    def video_info(path: str) -> dict[str, Any]:
        return asdict(container.video_info(path))

    def examine(**arguments: Any) -> dict[str, Any]:
        return asdict(transcoding.examine(**arguments))

    found: Functions = {
        "video_info": video_info,
        "frame_range": container.frame_range,
        "read": read,
        "examine": examine,
    }
    return {name: _explained(function) for name, function in found.items()}


def _explained(function: Callable[..., Any]) -> Callable[..., tuple[Any, str | None]]:
    def explained(**arguments: Any) -> tuple[Any, str | None]:
        try:
            return function(**arguments), None
        except UnreadableError as error:
            return None, error.reason
        except FewtokensError:
            raise
        except Exception as error:  # what no decoder was seen to raise yet; a bad file must not end a run
            return None, f"{type(error).__name__}: {error}"

    return explained
