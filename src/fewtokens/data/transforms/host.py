"""Helpers of transforms that decide on the CPU, for example how to group a batch, without waiting for the GPU."""

import torch
from torch import Tensor

from fewtokens.data import seeding


def cpu_generator(generator: torch.Generator) -> torch.Generator:
    """Return a CPU generator for the next random draws of a transform.

    This is `generator` itself if it is on the CPU. Otherwise the new generator is seeded with the state of `generator`,
    which the host knows without asking the device, and `generator` is advanced, so that the next call returns another.
    """
    if generator.device.type == "cpu":
        return generator
    seeded = seeding.generator(*generator.get_state().numpy().tolist())
    torch.rand(1, generator=generator, device=generator.device)
    return seeded


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to `device`. The copy from pinned memory does not wait for the work queued on a GPU."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
