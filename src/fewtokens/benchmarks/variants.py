"""The tokenizers that a benchmark compares, as configs: its own config with another tokenizer."""

import difflib
import hashlib
import logging
import shlex
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from fewtokens.analysis.evaluation import unwrap_compiled
from fewtokens.backbones.vit import ViT
from fewtokens.errors import FewtokensError
from fewtokens.runs.config import instantiate

log = logging.getLogger(__name__)
DENSE = "none"  # the entry of the dense model: the option of configs/tokenizer that reduces nothing


def overrides_of(entry: str, key: str = "tokenizers") -> list[str]:
    """Return the overrides that an entry stands for: "tome build.r=13" is tokenizer=tome tokenizer.build.r=13.

    Args:
        entry: An option of configs/tokenizer, followed by its settings.
        key: The key of the config that holds the entry, for the error message.

    Raises:
        FewtokensError: The entry names no option.
    """
    try:
        option, *settings = shlex.split(entry)
    except ValueError:  # it is empty, or has a quote without its end
        raise FewtokensError(
            f"`{key}` must name options of configs/tokenizer, got {entry!r}. Write one as 'tome build.r=13'."
        ) from None
    return [f"tokenizer={option}", *(part if "@" in part else f"tokenizer.{part}" for part in settings)]


def short_name(entry: str) -> str:
    """Return an entry as tables and plots show it: "tome r=13", or "dense"."""
    return "dense" if entry == DENSE else entry.replace("build.", "")


def compose_with(entry: str, key: str = "tokenizers") -> DictConfig:
    """Compose the command's config with another tokenizer.

    Args:
        entry: See `overrides_of`.
        key: See `overrides_of`.

    Raises:
        FewtokensError: The entry names no option, or a setting is none of the tokenizer's.
    """
    option, *settings = overrides_of(entry, key)
    job = HydraConfig.get()
    given: Any = OmegaConf.to_container(job.overrides.task)  # with interpolations as they were given
    overrides = [part for part in given if not part.startswith(("tokenizer=", "tokenizer."))]
    overrides.append(option)
    try:
        return hydra.compose(job.job.config_name, [*overrides, *settings])
    except HydraException as error:
        default = hydra.compose(job.job.config_name, overrides)  # raises the error if the option is what is wrong
        keys = ["at", *(f"build.{name}" for name in default.tokenizer.build if not str(name).startswith("_"))]
        names = [part.removeprefix("tokenizer.").partition("=")[0] for part in settings]
        near = [close for name in names for close in difflib.get_close_matches(name, keys, n=1)]
        hint = f"Did you mean {near[0]}?" if near else "Write it as 'tome build.r=13'."
        raise FewtokensError(
            f"`{key}` has an invalid setting in {entry!r}. The keys of {option.removeprefix('tokenizer=')} are "
            f"{', '.join(keys)}. {hint}"
        ) from error


def backbone_name(cfg: DictConfig) -> str:
    """Return the name of the backbone: timm's, or its option in configs/backbone, or its class if a run names it."""
    choice = HydraConfig.get().runtime.choices["backbone"]
    if choice == "run":  # the config of a checkpoint does not know which option it was
        choice = cfg.backbone._target_.rpartition(".")[2]
    return str(cfg.backbone.get("name") or choice)


def with_method(model: ViT, entry: str) -> tuple[ViT | None, str]:
    """Return the model with a method at work and the same weights, and the name of the method's class.

    The model is None, with a warning, if the method has parameters that the weights lack.
    """
    cfg = compose_with(entry, "methods")
    for key, none in (("weights", None), ("pretrained", False)):  # those of the model are copied below
        if key in cfg.backbone:
            cfg.backbone[key] = none
    name = str(cfg.tokenizer.build._target_).rpartition(".")[2]
    variant, state = unwrap_compiled(instantiate(cfg.backbone)), model.state_dict()
    own = variant.state_dict()
    lacking = [key for key, value in own.items() if key not in state or state[key].shape != value.shape]
    if lacking:
        log.warning(
            "%s is left out: the weights lack %d of its parameters. Give checkpoint=<run> of a model that was trained "
            "with it, and name it 'run'",
            entry,
            len(lacking),
        )
        return None, name
    variant.load_state_dict({key: state[key] for key in own})
    return variant.eval(), name


def sha256(*tensors: Tensor) -> str:
    """Return the SHA-256 of the values of some tensors, such as the weights of a model."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
