"""Seeds as pure functions of integers, so that a resumed run draws the same numbers as an uninterrupted one."""

import numpy as np
import torch

# What a draw is for, as the first integer. Different purposes then never share a seed, whatever their other integers.
ORDER, BATCH, IMAGE, SPLIT, REPLACEMENT = range(5)


def mix(*numbers: int) -> int:
    """Mix non-negative integers into one 63-bit seed, which also depends on their order.

    numpy's SeedSequence is specified bit for bit, so the result is the same on every machine and in every release.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator on `device` that is seeded with `mix(*numbers)`."""
    return torch.Generator(device=device).manual_seed(mix(*numbers))
