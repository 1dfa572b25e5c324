"""Measure what Lightning costs: a training step through Trainer.fit, and through a reference loop over the same parts.

    python -m fewtokens.benchmarks.train_step            (--data cifar10 --root data/cifar10)

Model, data, augmentation, optimizer, schedule and clipping are built from the same config, and both variants take
turns. A step is timed from its start to the start of the next one. This includes loading, augmentation, both passes and
the update, and with Lightning its callbacks, logs and ends of epochs. Start-up, the first steps, validation,
checkpoints and the progress bar are excluded. The reference loop does not seed every step, average the loss of an
epoch, write the csv file or handle signals: the ratio shows the cost of these, too.
"""

import argparse
import itertools
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from fewtokens.analysis.throughput import autocast
from fewtokens.data import seeding
from fewtokens.data.datamodule import DataModule
from fewtokens.errors import FewtokensError, check_choice, first_line
from fewtokens.runs import report
from fewtokens.runs.config import CONFIGS, instantiate
from fewtokens.runs.job import build_trainer
from fewtokens.tasks.classification import Classifier
from fewtokens.tasks.optim import parameter_groups, scale_learning_rates

OVERRIDES = {
    "digits": ["data=digits"],
    "cifar10": ["experiment=cifar10/keras_4_tokens"],
    "cifar10_strong": ["experiment=cifar10/strong_base"],
}
LIGHTNING, REFERENCE = "Lightning", "reference loop"
WARMUP = 5  # untimed steps, in which memory is allocated and kernels are chosen


class Timing(NamedTuple):
    """Seconds per step: elapsed, and of processor time in this process."""

    wall: float
    cpu: float


class Stopwatch(Callback):
    """Records the time at the start of two steps.

    Args:
        first: First step that is timed.
        last: Step at whose start the timing ends.
        device: Device of the work, which is synchronized at both times.
    """

    def __init__(self, first: int, last: int, device: torch.device) -> None:
        self.steps, self.device = (first, last), device
        self.times: list[tuple[float, float]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Record the time in Lightning's loop."""
        self.at(trainer.global_step)

    def at(self, step: int) -> None:
        """Record the time if the step is one of the two."""
        if step in self.steps:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.times.append((time.perf_counter(), time.process_time()))

    @property
    def timing(self) -> Timing:
        """Return the mean time of the steps between the two."""
        (wall, cpu), (wall_end, cpu_end) = self.times
        steps = self.steps[1] - self.steps[0]
        return Timing((wall_end - wall) / steps, (cpu_end - cpu) / steps)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = _parser().parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    overrides = [*([f"data.root={args.root}"] if args.root else []), *args.overrides]
    try:
        with tempfile.TemporaryDirectory() as folder:
            cfg = compose_config(args.data, folder, args.steps, overrides)
            variants = {
                LIGHTNING: lambda: train_with_lightning(cfg, device),
                REFERENCE: lambda: train_with_loop(cfg, device),
            }
            timings = take_turns(variants, args.rounds)
    except (FewtokensError, HydraException, OmegaConfBaseException) as error:
        print(f"Error: {error if isinstance(error, FewtokensError) else first_line(error)}", file=sys.stderr)
        return 1
    title = f"{args.data}, batch {cfg.data.batch_size}, {device}, {torch.get_num_threads()} thread(s)"
    overhead = show(timings, cfg.data.batch_size, title, Console())
    if args.write is not None:
        content = {
            "title": title,
            "batch_size": cfg.data.batch_size,
            "torch": torch.__version__,
            "device": report.device_name(device),
            "commit": report.commit(),
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "overrides": args.overrides,
            "seconds_per_step": {name: [timing._asdict() for timing in found] for name, found in timings.items()},
            "overhead": overhead,
        }
        args.write.write_text(json.dumps(content, indent=2) + "\n")
    return 0


def compose_config(data: str, folder: str, steps: int, overrides: Sequence[str] = ()) -> DictConfig:
    """Return the config of a training run without validation, checkpoints and progress bar.

    Args:
        data: "digits", "cifar10" or "cifar10_strong".
        folder: Folder for metrics.csv.
        steps: Number of timed steps.
        overrides: Further overrides.
    """
    fixed = [f"paths.run={folder}", "~callbacks.best", "~callbacks.last", "~callbacks.progress", "logger=csv"]
    fixed += [f"trainer.max_steps={WARMUP + steps + 1}", "trainer.max_epochs=-1", "trainer.limit_val_batches=0"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", [*OVERRIDES[data], *fixed, "trainer.enable_progress_bar=false", *overrides])


def build(cfg: DictConfig) -> tuple[DataModule, Classifier]:
    """Return data and task, which are the same on every call."""
    seed_everything(cfg.seed, verbose=False)
    return instantiate(cfg.data), instantiate(cfg.task)


def train_with_lightning(cfg: DictConfig, device: torch.device) -> Timing:
    """Train with the trainer, the default callbacks and the csv logger of the config."""
    data, task = build(cfg)
    watch = Stopwatch(WARMUP, cfg.trainer.max_steps - 1, device)
    callbacks = [watch, *(instantiate(node) for node in cfg.callbacks.values())]
    parts = {"callbacks": callbacks, "logger": [instantiate(node) for node in cfg.logger.values()]}
    # StopOnSignal is a Checkpoint, with which Lightning rejects False. Without one, True would add a ModelCheckpoint.
    saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
    build_trainer(cfg.trainer, **parts, accelerator=device.type, enable_checkpointing=saves).fit(task, data)
    return watch.timing


def train_with_loop(cfg: DictConfig, device: torch.device) -> Timing:
    """Train with a plain loop over the same parts."""
    check_choice("trainer.precision", cfg.trainer.precision, ("32-true", "bf16-mixed"))
    data, task = build(cfg)
    data.setup("fit")
    task.to(device).train()
    steps, clip = cfg.trainer.max_steps, cfg.trainer.gradient_clip_val
    optimizer = task.optimizer(parameter_groups(task.model, task.weight_decay, task.decay, task.layer_decay))
    scale_learning_rates(optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: task.schedule(step, steps))
    watch = Stopwatch(WARMUP, steps - 1, device)
    for step, batch in zip(range(steps), training_batches(data, device), strict=False):
        watch.at(step)
        images, target = batch if task.mix is None else task.mix(*batch)
        with autocast(device, cfg.trainer.precision):
            logits = task.model(images)
            loss = functional.cross_entropy(logits.float(), target, label_smoothing=task.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        if clip:
            clip_grad_norm_(task.parameters(), clip)
        optimizer.step()
        schedule.step()
    return watch.timing


def training_batches(data: DataModule, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield training batches without end, augmented on the device."""
    loader = data.train_dataloader()
    loader.pin_memory = device.type == "cuda"  # as with a trainer
    for epoch in itertools.count():
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for index, (images, target) in enumerate(loader):
            moved = images.to(device, non_blocking=True)
            draws = seeding.generator(seeding.BATCH, data.seed, 0, epoch, index, device=device)
            yield data.train_pipeline(moved, draws), target.to(device, non_blocking=True)


def take_turns(variants: Mapping[str, Callable[[], Timing]], rounds: int) -> dict[str, list[Timing]]:
    """Return the timings of every variant in every round. Every other round runs them in reverse order."""
    timings: dict[str, list[Timing]] = {name: [] for name in variants}
    for number in range(rounds):
        for name in list(variants)[:: 1 if number % 2 == 0 else -1]:
            timings[name].append(variants[name]())
    return timings


def show(timings: Mapping[str, list[Timing]], batch_size: int, title: str, console: Console) -> dict[str, float]:
    """Print medians and ratios, and return Lightning's overhead in time and in CPU time, relative to the reference."""
    table = Table("variant", "ms/step", "lowest", "highest", "images/s", "CPU ms/step", title=title)
    for name, found in timings.items():
        wall, cpu = [x.wall for x in found], [x.cpu for x in found]
        middle = statistics.median(wall)
        cells = [f"{1e3 * x:.2f}" for x in (middle, min(wall), max(wall))]
        table.add_row(name, *cells, f"{batch_size / middle:,.0f}", f"{1e3 * statistics.median(cpu):.2f}")
    console.print(table)
    overhead = {}
    for field, words in (("wall", "time"), ("cpu", "CPU time (steadier on a shared machine)")):
        pairs = zip(timings[LIGHTNING], timings[REFERENCE], strict=True)
        ratios = [getattr(lightning, field) / getattr(reference, field) for lightning, reference in pairs]
        overhead[field] = statistics.median(ratios) - 1
        spread = f"rounds from {100 * (min(ratios) - 1):+.1f} % to {100 * (max(ratios) - 1):+.1f} %"
        line = f"Lightning's overhead in {words}: {100 * overhead[field]:+.1f} % ({spread}; goal: at most 5 %)"
        console.print(line, soft_wrap=True)
    return overhead


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(OVERRIDES), default="digits")
    parser.add_argument("--root", help="folder of CIFAR-10")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each variant (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="timed steps per measurement (default: %(default)s)")
    parser.add_argument("--write", type=Path, help="json file for the numbers")
    parser.add_argument("overrides", nargs="*", help="overrides of the config for both variants: backbone.depth=2")
    return parser


if __name__ == "__main__":
    sys.exit(main())
