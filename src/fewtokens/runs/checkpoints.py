"""Checkpoints: written atomically, and read without executing anything in them."""

import logging
from math import isqrt, prod
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor, nn

from fewtokens.analysis.evaluation import unwrap_compiled
from fewtokens.errors import FewtokensError, first_line, listed
from fewtokens.files import replace_file
from fewtokens.layers.embedding import resample_positions
from fewtokens.runs.compose import saved_config

log = logging.getLogger(__name__)
MODEL = "model."  # prefix of the model's parameters in the state of a task


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a temporary file beside the checkpoint and renames it: a kill leaves the old file or the new one.

    Lightning writes its temporary file to $TMPDIR. From another file system it cannot be renamed, only copied.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        with replace_file(Path(path), "wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Return the content of a checkpoint, see `read`."""
        return read(Path(path), map_location or "cpu")


def read(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Return the content of a checkpoint. No code in it is executed.

    Raises:
        FewtokensError: The file does not exist, is incomplete, or contains pickled code.
    """
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise FewtokensError(f"There is no checkpoint {path}. Check the path.") from None
    except Exception as error:  # zip, pickle and torch each have errors of their own
        raise FewtokensError(
            f"{path} is not a complete checkpoint of tensors and plain values, which loads with weights_only=True: "
            f"{first_line(error)}. Use another checkpoint of the run. Files with code are never loaded."
        ) from error
    if not isinstance(content, dict):
        raise FewtokensError(f"{path} is not a checkpoint: it contains a {type(content).__name__}.")
    return content


def load_model(task: nn.Module, path: Path) -> None:
    """Load the model of a checkpoint into a task. The task's metrics and other state stay.

    Raises:
        FewtokensError: Names or shapes of parameters differ, or the positions belong to another grid of patches.
    """
    state, own = _models(task, path)
    missing, unexpected, mismatched = _differences(state, own)
    differing = [*missing, *unexpected, *mismatched]
    details = f"missing {listed(missing)}, unexpected {listed(unexpected)}, of another shape {listed(mismatched)}"
    if differing and all(".tokenizer." in name for name in differing):
        raise FewtokensError(
            f"{path} was trained with another tokenizer than the configured one, and the parameters of the two differ: "
            f"{details}. Use the tokenizer of the run (tokenizer=run, or no override of it), or the checkpoint of a "
            "dense run (tokenizer=none) for a method without parameters. A tokenizer with parameters must be trained "
            "first: train.py init_from=<run>."
        )
    if all(name.endswith("vit.pos_embed") for name in differing):  # or nothing differs: another grid of as many patches
        _check_grid(state, unwrap_compiled(task.model), path)
    if differing:
        raise FewtokensError(
            f"{path} does not fit the {len(own)} parameters and buffers of the configured model: {details}. Remove "
            "overrides that change the parameters. A tokenizer with parameters must be trained first."
        )
    task.load_state_dict(state, strict=False)  # names of the model were just checked; the state has no others


def start_from(task: nn.Module, path: Path) -> dict[str, float]:
    """Load what fits from the model of another run, as the start of training.

    Parameters that are missing there, such as those of a tokenizer, keep their initial values, and so does a head for
    other classes. Positions for another grid or another number of time steps are resampled. All such names are logged.

    Args:
        task: The task with the model.
        path: Checkpoint of the other run.

    Returns:
        How many parameters and buffers were `init/loaded`, `init/missing` there, and `init/unexpected`, not used here.

    Raises:
        FewtokensError: Nothing fits, a parameter other than the head has another shape, or positions have to be
            resampled and it is not known how they were laid out.
    """
    state, own = _models(task, path)
    _resample_positions(state, own, unwrap_compiled(task.model), path)
    missing, unexpected, mismatched = _differences(state, own)
    heads = [name for name in mismatched if ".head" in name]
    loaded = sorted(set(state) & set(own) - set(mismatched))
    if not loaded or len(mismatched) > len(heads):
        raise FewtokensError(
            "`init_from` must be a run of a model with the same width and depth; only its head may have another shape. "
            f"In {path}, {len(loaded)} of {len(own)} parameters and buffers fit, and "
            f"{listed([name for name in mismatched if name not in heads])} have another shape. Set `backbone` as in "
            "the config.yaml of that run."
        )
    log.info("init_from %s: %d loaded", path, len(loaded))
    initial = "which keep their initial values"
    left = {f"missing there, {initial}": missing, f"of another shape, {initial}": heads, "not used": unexpected}
    for what, names in left.items():
        if names:
            log.warning("init_from %s: %d %s: %s", path, len(names), what, ", ".join(names))
    task.load_state_dict({name: state[name] for name in loaded}, strict=False)
    counts = len(loaded), len(missing) + len(heads), len(unexpected)
    return dict(zip(("init/loaded", "init/missing", "init/unexpected"), map(float, counts), strict=True))


def _models(task: nn.Module, path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the state of the checkpoint's model, and that of the task's model."""
    state = read(path).get("state_dict", {})
    valid = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not valid or not all(isinstance(state[name], Tensor) for name in state if name.startswith(MODEL)):
        raise FewtokensError(
            f"{path} is not a checkpoint of train.py: its `state_dict` does not map names to tensors. Use a checkpoint "
            "of a run, or load the weights of another tool with backbone.weights=<file>."
        )
    # Other tools' compiled modules write this prefix. Ours are compiled in place.
    state = {name.replace("_orig_mod.", ""): value for name, value in state.items() if name.startswith(MODEL)}
    return state, {name: value for name, value in task.state_dict().items() if name.startswith(MODEL)}


def _differences(state: dict[str, Tensor], own: dict[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
    """Return the names that are missing in `state`, that are only there, and that have another shape."""
    mismatched = sorted(name for name in set(state) & set(own) if state[name].shape != own[name].shape)
    return sorted(set(own) - set(state)), sorted(set(state) - set(own)), mismatched


def _resample_positions(state: dict[str, Tensor], own: dict[str, Tensor], model: Any, path: Path) -> None:
    """Resample the positions in `state` to the layout of the model, also those of a second encoder over time."""
    for prefix, vit in ((MODEL, model), (f"{MODEL}temporal.", getattr(model, "temporal", None))):
        name = f"{prefix}vit.pos_embed"
        if vit is None or not {name} <= state.keys() & own.keys():
            continue
        table, grid = state[name], vit.encoder.tokenizers[0].context.grid
        new = (vit.frames, *grid) if vit is model else (*grid, 1)  # the second encoder's grid is time steps x 1
        count = own[name].shape[1] - prod(new)
        if table.shape[2] != own[name].shape[2]:  # the model has another width
            continue
        patches, kernel = table.shape[1] - count, state.get(f"{prefix}vit.patch_embed.proj.weight")
        old = _layout(patches, new, kernel, path) if vit is model else (patches, 1, 1)
        state[name] = resample_positions(table, count, old, new)


def _check_grid(state: dict[str, Tensor], model: Any, path: Path) -> None:
    """Raise an error if the positions in `state` belong to another grid of patches.

    Raises:
        FewtokensError: The image size in the config of the run gives other rows and columns.
    """
    kernel, sides = state.get(f"{MODEL}vit.patch_embed.proj.weight"), _image_size(path)
    if kernel is None or sides is None or f"{MODEL}vit.pos_embed" not in state:
        return
    old, new = (sides[0] // kernel.shape[-2], sides[1] // kernel.shape[-1]), model.encoder.tokenizers[0].context.grid
    if old != new:
        raise FewtokensError(
            f"The positions in {path} belong to {old[0]}x{old[1]} patches, and the configured model has "
            f"{new[0]}x{new[1]}. Use data.image_size={list(sides)} as in the run, or start a training with "
            f"init_from={path}, which resamples the positions."
        )


def _layout(patches: int, new: tuple[int, int, int], kernel: Tensor | None, path: Path) -> tuple[int, int, int]:
    """Return the time steps, rows and columns (T, H, W) of the patches in a checkpoint.

    They follow from the image size in the config of its run and from the kernel of the embedding. Without a config, as
    many patches as in the new model count as laid out alike, and another number of patches of an image as a square.
    """
    sides = _image_size(path)
    if sides is not None and kernel is not None:
        grid = sides[0] // kernel.shape[-2], sides[1] // kernel.shape[-1]
        if min(grid) > 0 and patches > 0 and patches % prod(grid) == 0 and (kernel.ndim == 5 or patches == prod(grid)):
            return patches // prod(grid), *grid
    elif patches == prod(new):
        return new
    elif (kernel is None or kernel.ndim == 4) and isqrt(max(patches, 0)) ** 2 == patches > 0:
        return 1, isqrt(patches), isqrt(patches)
    raise FewtokensError(
        f"The positions in {path} cannot be resampled to {new[0]} time steps of {new[1]}x{new[2]} patches: how its "
        f"{patches} positions are laid out does not follow from the image size in the config of its run. Use the "
        "`backbone.pool`, `data.frames` and `data.image_size` of that run."
    )


def _image_size(path: Path) -> tuple[int, int] | None:
    """Return (height, width) of the images of the run that a checkpoint belongs to, or None if it is not known."""
    try:
        config = saved_config(path)
    except FewtokensError:  # a checkpoint of an old version, or of another tool
        return None
    backbone = config["backbone"] if isinstance(config["backbone"], dict) else {}
    for node in (backbone.get("tubelets"), backbone, config.get("data")):  # the first two usually refer to the third
        match node:
            case {"image_size": int() as side}:
                return side, side
            case {"image_size": [int() as height, int() as width]}:
                return height, width
    return None
