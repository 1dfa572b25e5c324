"""Arrays from files of other frameworks, by their names: .npz files, and checkpoints of Flax."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewtokens.errors import FewtokensError, first_line

State = dict[str, Tensor]
# Where the parameters are in a training state of Flax, newest layout first.
FLAX_ROOTS = ("params.", "optimizer.target.params.", "optimizer.target.")
FLAX_ARRAY, FLAX_SCALAR = 1, 3  # msgpack's extension types in flax.serialization
CHUNKS = "__msgpack_chunked_array__"


def read_arrays(path: Path) -> State:
    """Return the arrays of an .npz file, or the parameters in a checkpoint of Flax (msgpack). Nothing is unpickled.

    Names are joined by dots. Of a training state only the parameters are returned, without the optimizer's.

    Raises:
        FewtokensError: The file does not exist, is neither, or is a checkpoint and msgpack is not installed.
    """
    if not path.is_file():
        raise FewtokensError(f"There is no file {path}. Set backbone.weights to scenic:<file> or keras:<file>.")
    if path.read_bytes()[:8] == b"\x89HDF\r\n\x1a\n":
        raise FewtokensError(
            f"{path} is an HDF5 file. Write an .npz file in Keras, with: "
            "numpy.savez(file, *model.get_weights(), pos_embed=positions)"
        )
    try:
        arrays = _read_npz(path) if zipfile.is_zipfile(path) else _read_flax(path)
    except FewtokensError:
        raise
    except Exception as error:  # every format has its own errors
        raise FewtokensError(
            f"{path} must be an .npz file of arrays without pickled objects, or a checkpoint of Flax, but: "
            f"{type(error).__name__}: {first_line(error)}."
        ) from error
    named = {name.replace("/", "."): value for name, value in arrays.items()}
    root = next((root for root in FLAX_ROOTS if any(name.startswith(root) for name in named)), "")
    return {name.removeprefix(root): value for name, value in named.items() if name.startswith(root)}


def _read_npz(path: Path) -> State:
    with np.load(path, allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def _read_flax(path: Path) -> State:
    try:
        import msgpack
    except ImportError as error:
        raise FewtokensError(
            f"{path} is no .npz file. To read a checkpoint of Flax, install msgpack (pip install msgpack), or write an "
            ".npz file in Flax: numpy.savez(file, **flax.traverse_util.flatten_dict(params, sep='/'))"
        ) from error

    def decode(code: int, data: bytes) -> Any:
        if code not in (FLAX_ARRAY, FLAX_SCALAR):
            return None
        shape, name, content = msgpack.unpackb(data, raw=False)
        if isinstance(name, bytes):
            name = name.decode()
        if name == "bfloat16":
            return torch.frombuffer(bytearray(content), dtype=torch.bfloat16).reshape(shape)
        return torch.from_numpy(np.frombuffer(bytearray(content), dtype=np.dtype(name)).reshape(shape))

    content = msgpack.unpackb(path.read_bytes(), ext_hook=decode, raw=False, strict_map_key=False)
    return _flattened(content, "")


def _flattened(node: Any, prefix: str) -> State:
    if isinstance(node, Tensor):
        return {prefix: node}
    if not isinstance(node, dict):  # numbers, strings, None
        return {}
    if CHUNKS in node:  # flax splits arrays of more than 1 GB
        parts, shape = node["chunks"], node["shape"]
        flat = torch.cat([parts[str(i)].flatten() for i in range(len(parts))])
        return {prefix: flat.reshape([shape[str(i)] for i in range(len(shape))])}
    children = (_flattened(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in node.items())
    return {name: value for child in children for name, value in child.items()}
