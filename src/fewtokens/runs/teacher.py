"""Load the teacher of a training run, and connect the task with it."""

import logging
from pathlib import Path
from typing import Any

import timm
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from fewtokens.analysis.cost import macs
from fewtokens.analysis.evaluation import unwrap_compiled
from fewtokens.analysis.flops import GIGA
from fewtokens.backbones.image_init import TIMM, rename_image_state
from fewtokens.backbones.pretrained import create, read_weights, timm_vit
from fewtokens.backbones.vit import ViT
from fewtokens.backbones.vivit import PLAIN
from fewtokens.errors import FewtokensError, check, listed
from fewtokens.files import checkpoint_in
from fewtokens.runs import checkpoints
from fewtokens.runs.compose import config_of
from fewtokens.runs.config import instantiate, plain
from fewtokens.tasks.classification import Classifier

log = logging.getLogger(__name__)
DENSE = {"at": [], "build": {"_target_": "fewtokens.tokenizers.base.Tokenizer", "_partial_": True}}


def connect(cfg: DictConfig, task: Any, data: Any) -> dict[str, float]:
    """Load the teacher that the config of a run names, if it does, and connect the task with it.

    Args:
        cfg: The config.
        task: The task.
        data: The datamodule, whose normalization is compared with the teacher's.

    Returns:
        `teacher/gmacs`, the multiply-adds of its forward pass per image or clip (1e9), and `teacher/params`; nothing
        without a teacher.

    Raises:
        FewtokensError: There is no such model, or it does not fit the task.
    """
    reference = getattr(task, "teacher", None)
    if reference is None:
        return {}
    fits = isinstance(task, Classifier) and task.distillation is not None
    check(fits, "task.distillation", "set with task.teacher", getattr(task, "distillation", None))
    model = load(str(reference), cfg, needs_tokens=task.distillation.tokens > 0)
    task.distillation.connect(task.model, model)
    _compare_normalization(model, data, str(reference))
    sample = torch.zeros(1, *unwrap_compiled(task.model).sample_shape)
    numbers = {"teacher/gmacs": macs(model, sample) / GIGA, "teacher/params": float(_count(model))}
    log.info("Teacher %s: %.3f GMACs, %.1f M parameters", reference, numbers["teacher/gmacs"], _count(model) / 1e6)
    return numbers


def load(reference: str, cfg: DictConfig, needs_tokens: bool = False) -> nn.Module:
    """Return the model that is the teacher.

    Args:
        reference: A run (its directory or a checkpoint), whose config is read as data; a file of weights, in our or
            timm's names, for the backbone of `cfg` without a tokenizer; or "timm:<name>", which timm downloads.
        cfg: The config of the run that is trained.
        needs_tokens: Whether it must be a ViT, since its tokens are compared. Other models of timm have logits only.

    Raises:
        FewtokensError: There is no such model, or the file does not fit.
    """
    if reference.startswith(TIMM):
        name = reference.removeprefix(TIMM)
        if not needs_tokens:
            return create(name, pretrained=True)
        classes = getattr(timm.get_pretrained_cfg(name), "num_classes", cfg.data.num_classes)
        size = cfg.data.image_size
        return timm_vit(name=name, image_size=size, num_classes=classes, tokenizer=PLAIN, pretrained=True)
    path = checkpoint_in(Path(reference))
    if path is None:
        raise FewtokensError(
            "`task.teacher` must be a run directory with checkpoints, a checkpoint, a file of weights, or timm:<name>, "
            f"got {reference!r}."
        )
    if path.suffix == ".ckpt":
        model = _backbone(OmegaConf.create(config_of(path)).backbone)
        checkpoints.load_model(nn.ModuleDict({"model": model}), path)
        return model
    model = _backbone(OmegaConf.create(plain(cfg, resolve=True)).backbone, tokenizer=DENSE)
    state, own = rename_image_state(read_weights(path)), model.state_dict()
    wrong = sorted(k for k in set(state) | set(own) if k not in state or k not in own or state[k].shape != own[k].shape)
    if wrong:
        raise FewtokensError(
            f"{path} does not hold the weights of the backbone without a tokenizer: {listed(wrong)}. Set task.teacher "
            "to a run, whose config tells its model, or to weights of the same backbone and for the same classes."
        )
    model.load_state_dict(state)
    return model


def _backbone(node: DictConfig, **changes: Any) -> ViT:
    """Return the model of a config without its own weights."""
    for key, none in (("weights", None), ("pretrained", False)):
        if key in node:
            node[key] = none
    for key, value in changes.items():
        node[key] = value
    return unwrap_compiled(instantiate(node))


def _compare_normalization(model: nn.Module, data: Any, reference: str) -> None:
    """Log a warning if timm's weights were trained with images that are normalized in another way."""
    known = getattr(getattr(model, "vit", model), "pretrained_cfg", None) or {}
    for name in ("mean", "std"):
        mine, their = getattr(data, name, None), known.get(name)
        if mine and their and max(abs(a - b) for a, b in zip(mine, their, strict=False)) > 0.01:
            log.warning("data.%s is %s, but the teacher %s was trained with %s", name, mine, reference, list(their))


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
