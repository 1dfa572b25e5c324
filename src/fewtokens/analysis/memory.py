"""Peak memory: the most bytes that a computation holds at once."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors that a call holds at once, beyond those that are there before it.

    On CUDA as its allocator counts them, the working memory of kernels included. Elsewhere the tensors that operations
    return are counted (`LiveTensors`): neither what a kernel takes for itself while it runs nor what Python, libraries
    and the allocator's reserve hold, which the size of the process would mix in.

    Args:
        run: Is called once, after it was called once to warm up.
        device: That it computes on.
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
    """Within it, the bytes of tensors that operations made and that are still held: `now`, and at most `peak`.

    Views count once, with what they are views of; what was made before counts not at all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note what it made."""
        for storage in _storages((args, kwargs)):
            self._note(storage, 0)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._note(storage, storage.nbytes())
        return result

    def _note(self, storage: UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _storages(tree: Any) -> list[UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
