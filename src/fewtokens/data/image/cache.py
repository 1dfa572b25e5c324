"""Decoded data sets on disk: the second start of a run reads one file."""

import os
import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]


def cached(path: Path, key: str, build: Callable[[], Tensors]) -> Tensors:
    """The tensors stored in `path` if they were stored under `key` and are whole; else what `build` returns, stored.

    Args:
        path: The cache file (safetensors: reading it runs no code).
        key: Names the state of the sources; another key means a rebuild.
        build: Called without arguments; decodes the sources.
    """
    tensors = _read(path, key)
    if tensors is None:
        tensors = build()
        _write(path, key, tensors)
    return tensors


def _read(path: Path, key: str) -> Tensors | None:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("key") != key:
            return None
        tensors = load_file(path)
    except (OSError, safetensors.SafetensorError):  # absent, truncated, or not such a file: all mended by a rebuild
        return None
    return tensors if metadata.get("crc32") == _checksum(tensors) else None


def _write(path: Path, key: str, tensors: Tensors) -> None:
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        save_file(tensors, temporary, metadata={"key": key, "crc32": _checksum(tensors)})
        os.chmod(temporary, 0o644)  # mkstemp makes files that other users of a shared data folder cannot read
        os.replace(temporary, path)  # atomic: another process sees the old file or the whole new one
    except (OSError, safetensors.SafetensorError) as error:
        warnings.warn(f"No cache was written to {path} ({error}); every start will decode the data anew.", stacklevel=2)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _checksum(tensors: Tensors) -> str:
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(tensors[name].contiguous().numpy().data, checksum)
    return str(checksum)
