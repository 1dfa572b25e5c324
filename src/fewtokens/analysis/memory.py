"""Peak memory: the largest number of bytes that a computation holds at once."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the largest number of bytes of tensors that a call holds at once, beyond those that existed before it.

    On CUDA, the allocator counts, and the working memory of kernels is included. Elsewhere `LiveTensors` counts the
    results of operations. It misses what a kernel allocates for itself, but unlike the size of the process it does not
    include Python, libraries and memory that the allocator keeps in reserve.

    Args:
        run: Called twice: to warm up, and to measure.
        device: The device on which it computes.
    """
    run()
    if device.type != "cuda":
        with LiveTensors() as live:
            run()
        return live.peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class LiveTensors(TorchDispatchMode):
    """A context that counts the bytes of the tensors that operations create in it, and that still exist.

    `now` is their current number and `peak` the largest so far. A view counts together with the tensor it views, and
    only once. Tensors that existed before do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count its results."""
        for storage in _storages((args, kwargs)):
            self._add(storage, 0)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._add(storage, storage.nbytes())
        return result

    def _add(self, storage: UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _storages(tree: Any) -> list[UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
