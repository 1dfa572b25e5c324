"""What Lightning costs: the training step through Trainer.fit, and through a bare loop over the same parts.

    python -m fewtokens.benchmarks.train_step            (--data cifar10 --root data/cifar10)

Model, data, augmentation, optimizer, schedule and clipping are built from the same config; both ways take turns. A step
is counted from the beginning of one to the beginning of the next: loading, augmentation, both passes, the update and,
in Lightning's case, its callbacks and logs, ends of epochs included. Not counted: starting up, the first steps,
validation, checkpoints and the progress bar, which a bare loop would not have for nothing either. What the bare loop
lacks, and the ratio therefore shows: seeding every step, the mean loss of the epoch, the csv file, signals.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from fewtokens.data import seeding
from fewtokens.data.datamodule import DataModule
from fewtokens.errors import FewtokensError
from fewtokens.runs import report
from fewtokens.runs.cli import CONFIGS
from fewtokens.runs.targets import instantiate
from fewtokens.tasks.classification import Classifier
from fewtokens.tasks.optim import parameter_groups

CHOICES = {"digits": ["data=digits"], "cifar10": ["experiment=cifar10/keras_4_tokens"]}
WARMUP = 5  # steps that are not counted: memory is allocated and kernels are chosen


class Timing(NamedTuple):
    """Seconds of one step: of the clock on the wall, and of the processor in this process."""

    wall: float
    cpu: float


class Stopwatch(Callback):
    """Notes the time at the beginning of two steps.

    Args:
        first: Step at which counting begins.
        last: Step at whose beginning it ends.
        device: Where the work is; waited for at both.
    """

    def __init__(self, first: int, last: int, device: torch.device) -> None:
        self.steps, self.device = (first, last), device
        self.read: list[tuple[float, float]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Lightning's call."""
        self.at(trainer.global_step)

    def at(self, step: int) -> None:
        """Note the time if it is one of the two."""
        if step in self.steps:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.read.append((time.perf_counter(), time.process_time()))

    @property
    def timing(self) -> Timing:
        """Of a step between the two."""
        (wall, cpu), (wall_end, cpu_end) = self.read
        steps = self.steps[1] - self.steps[0]
        return Timing((wall_end - wall) / steps, (cpu_end - cpu) / steps)


def composed(data: str, folder: str, steps: int, overrides: Sequence[str] = ()) -> DictConfig:
    """The config of a training run without validation, checkpoints and progress bar.

    Args:
        data: "digits" or "cifar10".
        folder: For metrics.csv.
        steps: That are counted.
        overrides: Further ones.
    """
    fixed = [f"paths.run={folder}", "~callbacks.best", "~callbacks.last", "~callbacks.progress", "logger=csv"]
    fixed += [f"trainer.max_steps={WARMUP + steps + 1}", "trainer.max_epochs=-1", "trainer.limit_val_batches=0"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", [*CHOICES[data], *fixed, "trainer.enable_progress_bar=false", *overrides])


def build(cfg: DictConfig) -> tuple[DataModule, Classifier]:
    """Data and model, alike on every call."""
    seed_everything(cfg.seed, verbose=False)
    return instantiate(cfg.data), instantiate(cfg.task)


def through_lightning(cfg: DictConfig, device: torch.device) -> Timing:
    """Train with the trainer, the default callbacks and the csv logger of the config."""
    data, task = build(cfg)
    watch = Stopwatch(WARMUP, cfg.trainer.max_steps - 1, device)
    callbacks = [watch, *(instantiate(node) for node in cfg.callbacks.values())]
    parts = {"callbacks": callbacks, "logger": [instantiate(node) for node in cfg.logger.values()]}
    # StopOnSignal counts as a Checkpoint, with which False is refused; without one, True would add a ModelCheckpoint.
    saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
    instantiate(cfg.trainer, **parts, accelerator=device.type, enable_checkpointing=saves).fit(task, data)
    return watch.timing


def bare(cfg: DictConfig, device: torch.device) -> Timing:
    """Train with a loop over the same parts and nothing else."""
    data, task = build(cfg)
    data.setup("fit")
    task.to(device).train()
    steps, clip = cfg.trainer.max_steps, cfg.trainer.gradient_clip_val
    optimizer = task.optimizer(parameter_groups(task.model, task.weight_decay, task.decay))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: task.schedule(step, steps))
    watch = Stopwatch(WARMUP, steps - 1, device)
    for step, batch in zip(range(steps), batches(data, device), strict=False):
        watch.at(step)
        images, target = batch if task.mix is None else task.mix(*batch)
        with _precision(cfg.trainer.precision, device):
            logits = task.model(images)
            loss = functional.cross_entropy(logits.float(), target, label_smoothing=task.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        if clip:
            clip_grad_norm_(task.parameters(), clip)
        optimizer.step()
        schedule.step()
    return watch.timing


def batches(data: DataModule, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The training batches, augmented on the device, for ever."""
    loader = data.train_dataloader()
    loader.pin_memory = device.type == "cuda"  # as it would be under a trainer
    for epoch in itertools.count():
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for index, (images, target) in enumerate(loader):
            moved = images.to(device, non_blocking=True)
            draws = seeding.generator(seeding.BATCH, data.seed, 0, epoch, index, device=device)
            yield data.train_pipeline(moved, draws), target.to(device, non_blocking=True)


def _precision(name: str, device: torch.device) -> AbstractContextManager[Any]:
    ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "32-true": nullcontext,
        "bf16-mixed": lambda: torch.autocast(device.type, torch.bfloat16),
    }
    if name not in ways:
        raise FewtokensError(
            "The bare loop knows two precisions", expected=list(ways), got=name, fix="set trainer.precision=32-true"
        )
    return ways[name]()


def measure(ways: dict[str, Callable[[], Timing]], rounds: int) -> dict[str, list[Timing]]:
    """The timings of every way in every round, in turns; every other round the other way round."""
    found: dict[str, list[Timing]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways)[:: 1 if number % 2 == 0 else -1]:
            found[name].append(ways[name]())
    return found


def show(found: dict[str, list[Timing]], batch_size: int, title: str, console: Console) -> dict[str, float]:
    """Print medians and ratios; give back the overhead in time and in CPU time, as a share."""
    table = Table("way", "ms/step", "lowest", "highest", "images/s", "CPU ms/step", title=title)
    for name, timings in found.items():
        wall, cpu = [x.wall for x in timings], [x.cpu for x in timings]
        middle = statistics.median(wall)
        shown = [f"{1e3 * x:.2f}" for x in (middle, min(wall), max(wall))]
        table.add_row(name, *shown, f"{batch_size / middle:,.0f}", f"{1e3 * statistics.median(cpu):.2f}")
    console.print(table)
    first, second = found.values()
    overhead = {}
    for field, words in (("wall", "time"), ("cpu", "CPU time (steadier where other work comes and goes)")):
        ratios = [getattr(a, field) / getattr(b, field) for a, b in zip(first, second, strict=True)]
        overhead[field] = statistics.median(ratios) - 1
        over = 100 * overhead[field]
        spread = f"rounds from {100 * (min(ratios) - 1):+.1f} % to {100 * (max(ratios) - 1):+.1f} %"
        console.print(f"Lightning's overhead in {words}: {over:+.1f} % ({spread}; goal: at most 5 %)", soft_wrap=True)
    return overhead


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(CHOICES), default="digits")
    parser.add_argument("--root", help="folder of CIFAR-10")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100, help="of one measurement")
    parser.add_argument("--write", type=Path, help="a json file for the figures")
    parser.add_argument("overrides", nargs="*", help="of the config, for both: backbone.depth=2")
    args = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    overrides = [*([f"data.root={args.root}"] if args.root else []), *args.overrides]
    try:
        with tempfile.TemporaryDirectory() as folder:
            cfg = composed(args.data, folder, args.steps, overrides)
            ways = {"Lightning": lambda: through_lightning(cfg, device), "bare loop": lambda: bare(cfg, device)}
            found = measure(ways, args.rounds)
    except FewtokensError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    title = f"{args.data}, batch {cfg.data.batch_size}, {device}, {torch.get_num_threads()} thread(s)"
    ratios = show(found, cfg.data.batch_size, title, Console())
    if args.write is not None:
        about = {"title": title, "torch": torch.__version__, "device": report.device(), "commit": report.commit()}
        about |= {"date": f"{datetime.now(UTC):%Y-%m-%d}", "overrides": args.overrides}
        seconds = {name: [timing._asdict() for timing in timings] for name, timings in found.items()}
        args.write.write_text(json.dumps({**about, "seconds_per_step": seconds, "overhead": ratios}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
