"""Timing of several things in turns, so that a clock that drifts drifts for all of them."""

import time
from collections.abc import Callable, Mapping
from statistics import quantiles

import torch

Run = Callable[[], None]


def interleaved(
    candidates: Mapping[str, Run],
    seconds: float,
    clock: Callable[[Run, int], float],
    sample: float = 0.02,
) -> dict[str, list[float]]:
    """Times several things in rounds: one sample of each per round, another one first in every round.

    A slow spell of a shared machine, or a processor that heats up, then hits all candidates and not the last one; and
    the values of one round can be compared with each other.

    Args:
        candidates: What to time. Each is run at least twice: once for warming up, once for its time.
        seconds: Ends with the round in which they are used up; warming up takes a fifth of it before.
        clock: Seconds that `times` calls of something take, `clock(run, times)`.
        sample: Seconds that a sample should last at least, as several calls in a row where one call is shorter; on a
            GPU they queue up, so that not the launching of kernels is timed.

    Returns:
        Seconds per call for every candidate, one value per round, in the order of the rounds.
    """
    names = list(candidates)
    calls = {}
    for name in names:
        clock(candidates[name], 1)  # lazy initialisation, compilation, choice of algorithms
        spent, calls[name] = 0.0, 1
        while spent < seconds / 5 / len(names):
            took = clock(candidates[name], calls[name])
            spent += took
            calls[name] = max(1, round(sample * calls[name] / max(took, 1e-9))) if took < sample else calls[name]
    times: dict[str, list[float]] = {name: [] for name in names}
    spent = 0.0
    while spent < seconds:
        for name in names:
            took = clock(candidates[name], calls[name])
            spent += took
            times[name].append(took / calls[name])
        names = names[1:] + names[:1]
    return times


def seconds_on(run: Run, times: int, device: torch.device) -> float:
    """Seconds that so many calls take: CUDA's own, between two events, or those of the clock on the wall."""
    _wait_for(device)
    if device.type == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(times):
            run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3
    start = time.perf_counter()
    for _ in range(times):
        run()
    _wait_for(device)
    return time.perf_counter() - start


def spread(values: list[float]) -> float:
    """Interquartile range; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    low, _, high = quantiles(values, n=4, method="inclusive")
    return high - low


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
