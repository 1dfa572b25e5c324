"""Images per second: the measure of a run, and the timing that `fewtokens.benchmarks` uses, too."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import lightning as L
import torch
from torch import nn

from fewtokens.analysis.evaluation import evaluating, load_test_images, unwrap_compiled
from fewtokens.errors import check, check_choice
from fewtokens.tokenizers.base import Tokenizer

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
Run = Callable[[], None]


class Throughput:
    """The measure of speed: forward passes in evaluation, with the tokenizer and without it, with the same weights.

    Args:
        seconds: Time to measure; warming up takes about a fifth more. A model that is slower than this is timed once.
        batch_size: Test images per forward pass; fewer if the test set is smaller.
        precision: "32-true", "bf16-mixed" or "16-mixed"; None for that of the task's trainer.

    Raises:
        FewtokensError: A setting is out of range.
    """

    def __init__(self, seconds: float = 4.0, batch_size: int = 64, precision: str | None = None) -> None:
        check(seconds > 0, "measure.throughput.seconds", "a number > 0", seconds)
        check(batch_size >= 1, "measure.throughput.batch_size", "an int >= 1", batch_size)
        check_choice("measure.throughput.precision", precision, (None, "32-true", *AUTOCAST))
        self.seconds, self.batch_size, self.precision = seconds, batch_size, precision

    def __call__(self, task: L.LightningModule, datamodule: L.LightningDataModule, run_dir: Path) -> dict[str, float]:
        """Time the model of a task on test images that are on its device already. A compiled model is timed compiled.

        Args:
            task: Its `.model` is timed.
            datamodule: Set up for testing.
            run_dir: Not used.

        Returns:
            `throughput/images_per_s`, `throughput/images_per_s_dense`: medians over the rounds;
            `throughput/speedup`: median of the ratios within a round; `throughput/speedup_spread`: their interquartile
            range; `throughput/batch_size`: images per forward pass.
        """
        images = load_test_images(task, datamodule, self.batch_size)
        model, encoder = task.model, unwrap_compiled(task.model).encoder
        assert isinstance(model, nn.Module)
        reducing = encoder.tokenizers
        with encoder.without_reduction():
            dense = encoder.tokenizers

        def forward(tokenizers: list[Tokenizer]) -> None:
            encoder.replace_tokenizers(tokenizers)
            model(images)

        candidates = {"tokenizer": partial(forward, reducing), "dense": partial(forward, dense)}
        try:
            precision = self.precision or trainer_precision(task)
            with evaluating(model), torch.inference_mode(), autocast(task.device, precision):
                times = time_in_turns(candidates, self.seconds, partial(seconds_on, device=images.device))
        finally:
            encoder.replace_tokenizers(reducing)
        ratios = [slow / fast for slow, fast in zip(times["dense"], times["tokenizer"], strict=True)]
        return {
            "throughput/images_per_s": len(images) / median(times["tokenizer"]),
            "throughput/images_per_s_dense": len(images) / median(times["dense"]),
            "throughput/speedup": median(ratios),
            "throughput/speedup_spread": interquartile_range(ratios),
            "throughput/batch_size": float(len(images)),
        }


def trainer_precision(task: L.LightningModule) -> str:
    """Return the precision of the task's trainer, or "32-true" without one."""
    trainer = getattr(task, "_trainer", None)  # the public property raises an error if there is none
    return "32-true" if trainer is None else str(trainer.precision)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Return the autocast of a mixed precision of Lightning, and for other precisions a context that does nothing."""
    dtype = AUTOCAST.get(precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def time_in_turns(
    candidates: Mapping[str, Run],
    seconds: float,
    clock: Callable[[Run, int], float],
    sample: float = 0.02,
) -> dict[str, list[float]]:
    """Time several candidates in rounds, with one sample of each per round and another one first in every round.

    A slow phase of a shared machine, or a processor that heats up, then affects all candidates alike, and the values of
    one round can be compared with each other.

    Args:
        candidates: Functions to time. Each is called at least twice: to warm up, and to be timed.
        seconds: Time to measure; the round in which it is used up is finished. Warming up takes a fifth of it before.
        clock: Returns the seconds that `times` calls of a function take: `clock(run, times)`.
        sample: Minimum seconds per sample. A shorter function is called several times in a row, so that on a GPU its
            kernels queue up and the time to launch them is hidden.

    Returns:
        Seconds per call of every candidate, one value per round, in the order of the rounds.
    """
    names = list(candidates)
    calls = {name: _warm_up(candidates[name], seconds / 5 / len(names), clock, sample) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    spent = 0.0
    while spent < seconds:
        for name in names:
            took = clock(candidates[name], calls[name])
            spent += took
            times[name].append(took / calls[name])
        names = names[1:] + names[:1]
    return times


def _warm_up(run: Run, seconds: float, clock: Callable[[Run, int], float], sample: float) -> int:
    """Return how many calls make up a sample, after calling the function for some seconds."""
    clock(run, 1)  # lazy initialization, compilation, choice of algorithms
    spent, calls = 0.0, 1
    while spent < seconds:
        took = clock(run, calls)
        spent += took
        calls = max(1, round(sample * calls / max(took, 1e-9))) if took < sample else calls
    return calls


def seconds_on(run: Run, times: int, device: torch.device) -> float:
    """Return the seconds that `times` calls take: between two events on CUDA, by the clock elsewhere."""
    _synchronize(device)
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
    _synchronize(device)
    return time.perf_counter() - start


def interquartile_range(values: list[float]) -> float:
    """Return the interquartile range of the values, 0 for a single value."""
    if len(values) < 2:
        return 0.0
    low, _, high = quantiles(values, n=4, method="inclusive")
    return high - low


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
