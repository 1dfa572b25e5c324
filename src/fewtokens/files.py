"""The path of the configs, atomic writing of files, and the checkpoint in a directory of a run."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from fewtokens.errors import write_error

# A wheel contains the configs, where a checkout has a link to configs/. Git for Windows may not make the link.
_IN_PACKAGE = Path(__file__).parent / "configs"
CONFIGS = _IN_PACKAGE.resolve() if _IN_PACKAGE.is_dir() else Path(__file__).parents[2] / "configs"


@contextmanager
def replace_file(
    path: Path, mode: str = "w", newline: str | None = None, errors: str | None = None
) -> Iterator[IO[Any]]:
    """Return a context that opens a temporary file, which replaces `path` when the block ends without an error.

    A reader, or the next start after a kill, finds the old file or the complete new one. The temporary file is
    `.<name>.part` in the folder of `path`, since a move from another file system would not be atomic.

    Args:
        path: The file to write. Its folder is created if necessary.
        mode: "w" or "wb".
        newline: See `open`.
        errors: See `open`.

    Raises:
        FewtokensError: The file cannot be written, for example because the disk is full.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open(mode, newline=newline, encoding=None if "b" in mode else "utf-8", errors=errors) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_directory(path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:  # after an error; otherwise it has been renamed
        with suppress(OSError):
            part.unlink(missing_ok=True)


def write_json(content: Any, path: Path) -> None:
    """Write a JSON file atomically.

    Raises:
        FewtokensError: The file cannot be written.
    """
    with replace_file(path) as file:
        file.write(json.dumps(content, indent=2) + "\n")


def read_record(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file, or an empty one if the file does not exist or somebody has damaged it."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def checkpoint_in(path: Path) -> Path | None:
    """Return `path` if it is a file; of the directory of a run the best checkpoint, or else the last; None without."""
    candidates = [path] if path.is_file() else [path / "checkpoints" / name for name in ("best.ckpt", "last.ckpt")]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _sync_directory(directory: Path) -> None:
    with suppress(OSError):  # not every file system can sync a directory; the rename is atomic nevertheless
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
