"""Random draws as pure functions of integers, so that a resumed run repeats exactly what the interrupted one drew."""

import numpy as np
import torch

# Namespaces of the draws: without them, rank 1 of epoch 0 could meet the numbers of rank 0 of epoch 1.
ORDER, BATCH, IMAGE, SPLIT, REPLACEMENT = range(5)


def mix(*numbers: int) -> int:
    """Mixes non-negative integers into one 63-bit seed; the order of the integers counts.

    numpy's SeedSequence is specified bit for bit, so the result holds over machines and releases.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device` that is seeded with `mix(*numbers)`."""
    return torch.Generator(device=device).manual_seed(mix(*numbers))
