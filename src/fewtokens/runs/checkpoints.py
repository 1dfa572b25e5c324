"""Checkpoints: written atomically, read without running anything in them."""

import logging
import os
from math import isqrt, prod
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from fewtokens.analysis.cost import plain
from fewtokens.errors import FewtokensError
from fewtokens.tokenizers.base import Tokenizer

log = logging.getLogger(__name__)
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
    state, own = _models(task, path)
    missing, unexpected, wrong = _differences(state, own)
    if missing or unexpected or wrong:
        raise FewtokensError(
            "The checkpoint fits the configured model",
            expected=f"the {len(own)} names and shapes of the model",
            got=f"missing {_some(missing)}, unexpected {_some(unexpected)}, of another shape {_some(wrong)} in {path}",
            fix="leave out overrides that change the parameters; a method with parameters must be trained first",
        )
    task.load_state_dict(state, strict=False)  # strict about all but the model was just checked


def start_from(task: nn.Module, path: Path) -> dict[str, float]:
    """Start a task's model from another run's weights, as far as names and shapes are the same.

    What one of both lacks, a tokenizer's parameters say, starts anew, as does a head for other classes; a table of
    positions for another lattice is resampled. Every name of that kind is logged.

    Args:
        task: With the model.
        path: Checkpoint of the other run.

    Returns:
        Parameters and buffers: `init/loaded`, `init/missing` (start anew), `init/unexpected` (not used).

    Raises:
        FewtokensError: Nothing fits, or something has another shape that must not.
    """
    state, own = _models(task, path)
    for name in [name for name in state if name == f"{MODEL}vit.pos_embed" and name in own]:
        tokenizer = plain(task.model).encoder.tokenizers[0]
        assert isinstance(tokenizer, Tokenizer)
        state[name] = _resampled(state[name], own[name], tokenizer.context.grid)
    missing, unexpected, wrong = _differences(state, own)
    heads = [name for name in wrong if ".head" in name]
    loaded = sorted(set(state) & set(own) - set(wrong))
    if not loaded or len(wrong) > len(heads):
        raise FewtokensError(
            "init_from takes the weights of a model of the same kind and width",
            expected=f"names and shapes of the {len(own)} parameters here; only the head may have another shape",
            got=f"of another shape {_some([n for n in wrong if n not in heads])}, {len(loaded)} that fit in {path}",
            fix="set backbone=... and its sizes to those of that run: see its config.yaml",
        )
    log.info("init_from %s: %d loaded", path, len(loaded))
    for names, words in ((missing, "missing there, start anew"), (unexpected, "unexpected, not used"),
                         (heads, "of another shape, start anew")):  # fmt: skip
        if names:
            log.warning("init_from %s: %d %s: %s", path, len(names), words, ", ".join(names))
    task.load_state_dict({name: state[name] for name in loaded}, strict=False)
    counts = {"loaded": len(loaded), "missing": len(missing) + len(heads), "unexpected": len(unexpected)}
    return {f"init/{name}": float(count) for name, count in counts.items()}


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


def _models(task: nn.Module, path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state of the checkpoint's model, and of the task's."""
    content = read(path)
    # A compiled submodule of another tool writes this prefix; ours compile in place.
    state = {k.replace("_orig_mod.", ""): v for k, v in content.get("state_dict", {}).items() if k.startswith(MODEL)}
    return state, {k: v for k, v in task.state_dict().items() if k.startswith(MODEL)}


def _differences(state: dict[str, Tensor], own: dict[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
    """Names that are missing in the state, unexpected, and of another shape."""
    wrong = sorted(k for k in set(state) & set(own) if state[k].shape != own[k].shape)
    return sorted(set(own) - set(state)), sorted(set(state) - set(own)), wrong


def _resampled(table: Tensor, own: Tensor, grid: tuple[int, int]) -> Tensor:
    """Positions (1, P+N, C) for another lattice; as they are where that is not the difference."""
    prefix = own.shape[1] - prod(grid)
    square = prefix >= 0 and isqrt(table.shape[1] - prefix) ** 2 == table.shape[1] - prefix
    if table.shape[1] == own.shape[1] or table.shape[2] != own.shape[2] or not square:
        return table
    return resample_abs_pos_embed(table, list(grid), num_prefix_tokens=prefix)


def _some(names: list[str]) -> str:
    return "none" if not names else f"{', '.join(names[:4])}{' ...' if len(names) > 4 else ''} ({len(names)})"


def _sync_directory(directory: Path) -> None:
    try:
        handle = os.open(directory, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    except OSError:  # not every file system lets a directory be synced; the rename is atomic all the same
        pass
