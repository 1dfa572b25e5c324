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

from fewtokens.data.video.records import UnreadableError, VideoInfo, require
from fewtokens.data.video.watchdog import Allocate, Functions, GivenUp, Watched
from fewtokens.errors import FewtokensError, write_error

PART = ".part.mp4"  # at the end of the name of a copy that is being made


class Reader:
    """The functions of `fewtokens.data.video.decoders` under a time limit.

    Args:
        decoder: "decord", "torchcodec" or "pyav".
        limit: Seconds that reading a clip may take.

    Raises:
        FewtokensError: The decoder is unknown or not installed.
    """

    def __init__(self, decoder: str = "pyav", limit: float = 60.0) -> None:
        require(decoder)
        if limit <= 0:
            raise FewtokensError(
                "A decoder is given up after a time",
                expected="more than 0 s",
                got=limit,
                fix="set data.decode_limit=60",
            )
        self.decoder, self.watched = decoder, Watched(__name__, float(limit))

    def facts(self, path: str) -> VideoInfo:
        """What there is to know of a file; UnreadableError if its frames cannot be found."""
        return VideoInfo(**self._call("facts", path))

    def span(self, path: str, start: float | None, end: float | None) -> tuple[int, int]:
        """First frame and number of frames between two times in seconds; UnreadableError if there is none."""
        first, count = self._call("span", path, start=start, end=end)
        return first, count

    def read(
        self, path: str, indices: Sequence[int], short_side: int | None = None, known: VideoInfo | None = None
    ) -> UInt8[np.ndarray, "t 3 h w"]:
        """Frames as `decoding.read` gives them, valid until the next call: the memory is used again."""
        facts = None if known is None else asdict(known)
        wanted = [int(index) for index in indices]
        shape = self._call("read", path, indices=wanted, decoder=self.decoder, short_side=short_side, known=facts)
        return self.watched.memory(tuple(shape)).transpose(0, 3, 1, 2)

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
        part = Path(target).with_name(f".{os.getpid()}-{threading.get_ident()}{PART}")
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
        self.watched.close()

    def _call(self, name: str, path: str, **arguments: Any) -> Any:
        try:
            result, reason = self.watched.call(name, path=path, **arguments)
        except GivenUp as ended:
            raise UnreadableError(path, str(ended)) from None
        if reason is not None:
            raise UnreadableError(path, reason)
        return result


def functions(allocate: Allocate) -> Functions:
    """For the other process, which alone loads decoders: every function returns its result or why there is none.

    Nothing that this file imports loads torch, so that the process is lean and there at once.
    """
    from fewtokens.data.prepare import transcode as transcoding
    from fewtokens.data.video import container
    from fewtokens.data.video import decoders as decoding

    def read(path: str, known: dict[str, Any] | None, **arguments: Any) -> tuple[int, ...]:
        facts = None if known is None else VideoInfo(**known)
        t, c, h, w = decoding.read(path, known=facts, allocate=allocate, **arguments).shape
        return t, h, w, c

    def facts(path: str) -> dict[str, Any]:
        return asdict(container.facts(path))

    def examine(**arguments: Any) -> dict[str, Any]:
        return asdict(transcoding.examine(**arguments))

    found: Functions = {"facts": facts, "span": container.span, "read": read, "examine": examine}
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
