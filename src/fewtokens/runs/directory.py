"""The directory of a run: its lock, `config.yaml` and `run.json`, and what training records in its checkpoints."""

import fcntl
import platform
import shlex
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig, open_dict

from fewtokens.callbacks.loggers import CsvLogger
from fewtokens.callbacks.pruning import PrunedError
from fewtokens.callbacks.signals import Stopped
from fewtokens.errors import FewtokensError, check, write_error
from fewtokens.files import read_record, write_json
from fewtokens.masking import masked
from fewtokens.runs import config, report
from fewtokens.runs.distributed import is_rank_zero


class RunDirectory:
    """A context manager that locks the directory of a run and records in `run.json` how the run ended.

    Only rank 0 locks and writes. A new run is recorded at once. A resumed one is recorded when `begin` is called, after
    its first step: if it cannot be resumed with these settings, its files stay as they were.

    Args:
        cfg: The config of the job.

    Raises:
        FewtokensError: Another process writes to the directory, it contains another run, or it cannot be written.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg, self.path = cfg, Path(HydraConfig.get().runtime.output_dir)
        self.begun = False

    def __enter__(self) -> "RunDirectory":
        valid = isinstance(self.cfg.name, str | int) and config.NAME.fullmatch(str(self.cfg.name))
        check(bool(valid), "name", "the name of a folder below outputs/", self.cfg.name)
        check(isinstance(self.cfg.paths.outputs, str), "paths.outputs", "a folder", self.cfg.paths.outputs)
        with open_dict(self.cfg):  # the choice that it refers to is unknown to a command that composes on this run
            self.cfg.name = str(self.cfg.name)
        if is_rank_zero():
            self._lock()
            try:
                if self.cfg.resume is None:
                    self._check_unused()
                    self.begin()
            except FewtokensError:
                self._lock_file.close()
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not is_rank_zero():
            return
        if error is not None and self.begun:
            with suppress(FewtokensError):  # such as a full disk, which may be the reason for `error`
                self._write(**_ending(error))
        self._lock_file.close()

    def begin(self) -> None:
        """Write `config.yaml`, and `run.json` with the status "started", unless this was done before."""
        if is_rank_zero() and not self.begun:
            config.save(self.cfg, self.path)
            self._write(status="started")
            self.begun = True

    def finish(self, measured_on: str | None = None) -> None:
        """Record the end of the run.

        Args:
            measured_on: Name of the device on which cost and speed were measured.
        """
        self._write(status="finished", **({} if measured_on is None else {"measured_on": measured_on}))

    @property
    def choices(self) -> dict[str, str]:
        """Return the option of every group, of a resumed run those that it began with."""
        chosen = HydraConfig.get().runtime.choices
        choices = {str(k): str(v) for k, v in chosen.items() if not str(k).startswith("hydra") and v is not None}
        return read_record(self.path / "run.json").get("choices", choices)

    def _lock(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock_file = (self.path / ".lock").open("w")
        except OSError as error:
            raise write_error(self.path, error) from error
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FewtokensError(
                f"Another process writes to {self.path}. Wait for its end, or choose another directory with "
                "hydra.run.dir=<directory>."
            ) from None
        except OSError:  # some network file systems have no locks
            pass

    def _check_unused(self) -> None:
        for name, state in (("report.json", "a finished run"), ("checkpoints/last.ckpt", "an unfinished run")):
            if (self.path / name).exists():
                raise FewtokensError(
                    f"{self.path} contains {state} ({name}), which a new run would overwrite. Continue it with "
                    f"train.py resume={self.path}, or choose another directory with hydra.run.dir=<directory>."
                )

    def _write(self, status: str, **more: Any) -> None:
        path, hydra = self.path / "run.json", HydraConfig.get()
        before = read_record(path)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        command = shlex.join(["python", *_program(), *hydra.overrides.task])
        content = {
            "name": self.cfg.name,
            "tags": list(self.cfg.tags),
            "status": status,
            "command": before.get("command", command),  # a resumed run keeps the command that started it
            "last_command": command,
            "choices": self.choices,
            "seed": self.cfg.seed,
            "commit": report.commit(),
            "versions": {"python": platform.python_version(), **report.versions()},
            "device": report.device(),
            "started": before.get("started", now),
            "written": now,
        }
        write_json(masked(content | more), path)


class TrainingRecord(Callback):
    """Writes the files of a run after its first step, and keeps config and numbers of the training in checkpoints.

    With the config in it, a checkpoint alone can be evaluated. With the numbers, a resumed run reports what was
    measured before it stopped.

    Args:
        run: Directory of the run.

    Attributes:
        numbers: `train/seconds` (without work that was lost in a kill), `val/*` of the last validation, and what was
            added before training.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run, self.text = run, yaml.safe_dump(config.plain(run.cfg), sort_keys=False)
        self.numbers: dict[str, float] = {}
        self._began: float | None = None

    @property
    def has_begun(self) -> bool:
        """Return whether training has begun, and a checkpoint to resume from has been loaded."""
        return self._began is not None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and let loggers delete the rows of lost work, which a resumed run logs again."""
        self._began = time.monotonic() - self.numbers.get("train/seconds", 0.0)
        for logger in trainer.loggers:
            if isinstance(logger, CsvLogger):
                logger.rewind(trainer.global_step)

    def on_train_batch_end(self, *args: Any) -> None:
        """Write the files of the run. A step has succeeded, so that the checkpoint fits optimizer and data, too."""
        self.run.begin()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Update the numbers."""
        self._update(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add config and numbers to the checkpoint."""
        self._update(trainer)
        checkpoint |= {"config": self.text, "numbers": dict(self.numbers)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the numbers, and check the paths in the states of the other callbacks, which are loaded after this.

        Lightning deletes the files that they name when it has written better ones.

        Raises:
            FewtokensError: The checkpoint comes from elsewhere, and names files outside of its folder.
        """
        numbers = checkpoint.get("numbers")
        known = numbers if isinstance(numbers, dict) else {}
        self.numbers = {str(name): number for name, number in known.items() if isinstance(number, float)}
        for text in _texts(checkpoint.get("callbacks")):
            if ".." in Path(text).parts or "::" in text or "://" in text:
                raise FewtokensError(
                    f"The run cannot be resumed: a callback in its checkpoint names the file {text!r}, which would be "
                    "deleted. Start a new run from its weights with init_from."
                )

    def _update(self, trainer: Trainer) -> None:
        if self._began is not None:
            self.numbers["train/seconds"] = time.monotonic() - self._began
        self.numbers |= {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}


def _texts(node: Any) -> Iterator[str]:
    """Yield all texts in a tree, those of keys too."""
    if isinstance(node, str):
        yield node
    for part in [*node.keys(), *node.values()] if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _texts(part)


def _ending(error: BaseException) -> dict[str, Any]:
    """Return the status that an error gives to a run, its reason and, unless this says all, its traceback."""
    if isinstance(error, Stopped | KeyboardInterrupt):
        return {"status": "stopped", "reason": getattr(error, "reason", "interrupted")}
    if isinstance(error, PrunedError):
        return {"status": "stopped", "reason": str(error)}
    if isinstance(error, FewtokensError):
        return {"status": "failed", "reason": str(error)}
    lines = "".join(traceback.format_exception(error)).splitlines()
    return {"status": "failed", "reason": f"{type(error).__name__}: {error}", "traceback": lines}


def _program() -> list[str]:
    """Return what python was asked to run: a file, or a module by `-m`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return ["-m", spec.name] if spec is not None and spec.name.startswith("fewtokens.") else [Path(sys.argv[0]).name]
