"""Checkpoints: written atomically, read without running anything in them."""

import os
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from fewtokens.errors import FewtokensError

MODEL = "model."  # how the names of a task's model begin


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, then renames: a kill leaves the old file or the new one, never half of one.

    Lightning builds its temporary file in $TMPDIR, whose move to another file system is no rename.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the checkpoint, to the disk and not only to its cache."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        with part.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
        _sync_directory(target.parent)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Read a checkpoint of plain values."""
        return read(Path(path), map_location or "cpu")


def read(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """A checkpoint's content; nothing in it is executed.

    Raises:
        FewtokensError: It is not there, cut short, or holds pickled code.
    """
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        content = None
    except Exception as error:  # zip, pickle and torch each have errors of their own
        raise FewtokensError(
            "A checkpoint is a whole file of tensors and plain values",
            expected="a file that torch.load(weights_only=True) reads",
            got=f"{path}: {str(error).splitlines()[0]}",
            fix="use another checkpoint of the run; one that holds code is not loaded, whatever its source",
        ) from error
    if not isinstance(content, dict):
        found = "no such file" if content is None else f"a {type(content).__name__}"
        raise FewtokensError("A checkpoint is a file", expected=str(path), got=found, fix="check the path")
    return content


def load_model(task: nn.Module, path: Path) -> None:
    """Put the weights of a checkpoint's model into that of a task; metrics and the like stay.

    Raises:
        FewtokensError: Names or shapes differ.
    """
    content = read(path)
    # A compiled submodule of another tool writes this prefix; ours compile in place.
    state = {k.replace("_orig_mod.", ""): v for k, v in content.get("state_dict", {}).items() if k.startswith(MODEL)}
    own = {k: v for k, v in task.state_dict().items() if k.startswith(MODEL)}
    missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    wrong = sorted(k for k in set(state) & set(own) if state[k].shape != own[k].shape)
    if missing or unexpected or wrong:
        raise FewtokensError(
            "The checkpoint fits the configured model",
            expected=f"the {len(own)} names and shapes of the model",
            got=f"missing {_some(missing)}, unexpected {_some(unexpected)}, of another shape {_some(wrong)} in {path}",
            fix="leave out overrides that change the parameters; a method with parameters must be trained first",
        )
    task.load_state_dict(state, strict=False)  # strict about all but the model was just checked


class EmbedConfig(Callback):
    """Puts the run's config, as text, into every checkpoint, so that a file alone can be evaluated.

    Args:
        config: The config as plain values.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.text = yaml.safe_dump(config, sort_keys=False)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add it."""
        checkpoint["config"] = self.text


def _some(names: list[str]) -> str:
    return "none" if not names else f"{', '.join(names[:4])}{' ...' if len(names) > 4 else ''} ({len(names)})"


def _sync_directory(directory: Path) -> None:
    try:
        handle = os.open(directory, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    except OSError:  # not every file system lets a directory be synced; the rename is atomic all the same
        pass
