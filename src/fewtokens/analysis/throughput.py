"""Images per second: models timed in turns, so that a clock that drifts drifts for all of them."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import lightning as L
import torch
from torch import nn

from fewtokens.analysis.cost import evaluating, plain, test_images
from fewtokens.errors import FewtokensError

Run = Callable[[], None]
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Throughput:
    """The measure of speed: forward passes in evaluation, with the tokenizer and without, the same weights.

    Args:
        seconds: Time to spend, warm-up not included (about a fifth more). A model too slow for it is timed once.
        batch_size: Test images per forward pass; fewer if there are no more.
        precision: "32-true", "bf16-mixed" or "16-mixed"; None for what the task's trainer has.
    """

    def __init__(self, seconds: float = 4.0, batch_size: int = 64, precision: str | None = None) -> None:
        if seconds <= 0 or batch_size < 1:
            raise FewtokensError(
                "Timing needs time and a batch",
                expected="seconds > 0 and batch_size >= 1",
                got=f"seconds={seconds}, batch_size={batch_size}",
                fix="set measure.throughput.seconds=4 measure.throughput.batch_size=64",
            )
        self.seconds, self.batch_size, self.precision = seconds, batch_size, precision

    def __call__(self, task: L.LightningModule, datamodule: L.LightningDataModule, run_dir: Path) -> dict[str, float]:
        """Times the model of a task, compiled if it is, on test images that lie on its device already.

        Args:
            task: Its `.model` is timed.
            datamodule: Set up for testing.
            run_dir: Not written to.

        Returns:
            `throughput/images_per_s`, `throughput/images_per_s_dense`: medians over the rounds;
            `throughput/speedup`: the median of the ratios within a round, `throughput/speedup_spread` their
            interquartile range; `throughput/batch_size`: what came of the setting.
        """
        images = test_images(task, datamodule, self.batch_size)
        model, encoder = task.model, plain(task.model).encoder
        assert isinstance(model, nn.Module)
        reducing = encoder.tokenizers
        with encoder.dense():
            dense = encoder.tokenizers

        def forward(tokenizers: nn.ModuleList) -> None:
            encoder.tokenizers = tokenizers
            model(images)

        candidates = {"tokenizer": partial(forward, reducing), "dense": partial(forward, dense)}
        try:
            with evaluating(model), torch.inference_mode(), self._autocast(task):
                times = interleaved(candidates, self.seconds, partial(wall_seconds, device=images.device))
        finally:
            encoder.tokenizers = reducing
        ratios = [slow / fast for slow, fast in zip(times["dense"], times["tokenizer"], strict=True)]
        return {
            "throughput/images_per_s": len(images) / median(times["tokenizer"]),
            "throughput/images_per_s_dense": len(images) / median(times["dense"]),
            "throughput/speedup": median(ratios),
            "throughput/speedup_spread": spread(ratios),
            "throughput/batch_size": float(len(images)),
        }

    def _autocast(self, task: L.LightningModule) -> AbstractContextManager:
        trainer = getattr(task, "_trainer", None)  # the public property raises where there is none
        dtype = AUTOCAST.get(self.precision or (trainer.precision if trainer is not None else "32-true"))
        return nullcontext() if dtype is None else torch.autocast(task.device.type, dtype)


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


def wall_seconds(run: Run, times: int, device: torch.device) -> float:
    """Seconds that so many calls take, until the device is done with them."""
    _wait_for(device)
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
