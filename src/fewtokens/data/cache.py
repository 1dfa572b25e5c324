"""Tensors in a cache file, which is replaced atomically, checked, and tied to the state of its sources."""

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
    """Return the tensors stored in `path` if they are intact and were stored under `key`; else build and store them.

    Args:
        path: The cache file (safetensors: reading it runs no code).
        key: Describes the state of the sources. Another key means that they are decoded again.
        build: Decodes the sources.
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
    except (OSError, safetensors.SafetensorError):  # missing, truncated, or not such a file: it is built again
        return None
    return tensors if metadata.get("crc32") == _checksum(tensors) else None


def _write(path: Path, key: str, tensors: Tensors) -> None:
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        save_file(tensors, temporary, metadata={"key": key, "crc32": _checksum(tensors)})
        os.chmod(temporary, 0o644)  # mkstemp denies access to the other users of a shared data folder
        os.replace(temporary, path)  # atomic: another process sees the old file or the complete new one
    except (OSError, safetensors.SafetensorError) as error:
        warnings.warn(f"Cannot write the cache {path} ({error}). Every start will read the data again.", stacklevel=2)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _checksum(tensors: Tensors) -> str:
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(tensors[name].contiguous().numpy().data, checksum)
    return str(checksum)
