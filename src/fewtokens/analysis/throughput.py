"""Images per second, as a measure of a run; `python -m fewtokens.benchmarks.throughput` compares tokenizers."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median

import lightning as L
import torch
from torch import nn

from fewtokens.analysis.cost import evaluating, plain, test_images
from fewtokens.analysis.timing import interleaved, seconds_on, spread
from fewtokens.benchmarks.comparison import AUTOCAST
from fewtokens.errors import FewtokensError
from fewtokens.tokenizers.base import Tokenizer


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
        with encoder.without_reduction():
            dense = encoder.tokenizers

        def forward(tokenizers: list[Tokenizer]) -> None:
            encoder.replace_tokenizers(tokenizers)
            model(images)

        candidates = {"tokenizer": partial(forward, reducing), "dense": partial(forward, dense)}
        try:
            with evaluating(model), torch.inference_mode(), self._autocast(task):
                times = interleaved(candidates, self.seconds, partial(seconds_on, device=images.device))
        finally:
            encoder.replace_tokenizers(reducing)
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
