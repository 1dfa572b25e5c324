"""From a composed config to objects, and to the `config.yaml` of the run: checks, instantiation, saving."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra.utils
from hydra.errors import InstantiationException
from omegaconf import DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fewtokens.arguments import argument_types, described, fits, unknown_argument
from fewtokens.errors import FewtokensError, check, first_line
from fewtokens.files import CONFIGS, replace_file
from fewtokens.masking import masked

CONFIG = "config.yaml"
SEVERAL = ("callbacks", "extras", "init_image", "logger", "measure", "paths", "tokenizer")  # groups with other values
# Folders whose files set what other groups have
GLOBAL = ("debug", "experiment", "hparams_search", "hydra", "launcher", "local")
NAME = re.compile(r"[\w][\w.\- ]*(?:/[\w][\w.\- ]*)*")  # of a run: a folder below outputs/
NOT_SAVED = ("hydra", "resume", "checkpoint", "sweep", "experiment")  # they belong to a command and not to the run
HYDRA_KEYS = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")


def check_groups(cfg: DictConfig) -> None:
    """Raise an error if a group of the config was set to null or to a single value."""
    for group in CONFIGS.iterdir():
        if group.is_dir() and group.name not in GLOBAL:
            options = ", ".join(sorted(path.stem for path in group.glob("*.yaml")))
            node = OmegaConf.select(cfg, group.name)
            valid = isinstance(node, DictConfig) and ("_target_" in node or group.name in SEVERAL)
            check(valid, group.name, f"an option of configs/{group.name} ({options})", node)


def instantiate(node: DictConfig | dict[str, Any], **arguments: Any) -> Any:
    """Call Hydra's `instantiate`, after a check that every target in the node exists and accepts its arguments.

    Args:
        node: A node of the config.
        arguments: Further arguments of its target.

    Raises:
        FewtokensError: A target does not exist, an interpolation fails, or an argument is wrong.
    """
    config: Any = node if OmegaConf.is_config(node) else OmegaConf.create(node)
    try:
        for call in calls(config):
            check_arguments(target_of(str(call["_target_"])), call)
        resolved = OmegaConf.to_container(config, resolve=True)
        # Hydra resolves what it gets once more: an escaped interpolation would become a target after the check.
        check("${" not in str(resolved), "the config", "without escaped interpolations", resolved)
        return hydra.utils.instantiate(resolved, _convert_="all", **arguments)
    except OmegaConfBaseException as error:
        raise FewtokensError(
            f"The config cannot be resolved: {first_line(error)}. See it with: python train.py --cfg job"
        ) from error
    except InstantiationException as error:
        raise _reason(error) from error


def calls(node: Node) -> Iterator[DictConfig]:
    """Yield every node with a `_target_` in a config, also behind interpolations.

    Raises:
        FewtokensError: A mandatory value is missing.
    """
    node = node._dereference_node()
    if not isinstance(node, DictConfig | ListConfig) or node._is_none():
        return
    if isinstance(node, DictConfig) and "_target_" in node:
        yield node
    for key in node if isinstance(node, DictConfig) else range(len(node)):
        check(not OmegaConf.is_missing(node, key), node._get_full_key(key), "set", "nothing")
        yield from calls(node._get_node(key))  # type: ignore[arg-type]


def target_of(name: str) -> Callable[..., Any]:
    """Return the class or function that a `_target_` names.

    Which ones somebody else's config may name is decided when it is read, see `saved_config`.

    Raises:
        FewtokensError: It does not exist, cannot be imported, or cannot be called.
    """
    try:
        found = hydra.utils.get_object(name)
    except Exception as error:  # importing a module runs it, and it may raise anything
        cause = error.__cause__ or error
        raise FewtokensError(
            f"`_target_: {name}` does not exist or cannot be imported: {type(cause).__name__}: {first_line(cause)}. "
            "Check the spelling, and that its package is installed or in the folder of train.py. A run that was saved "
            "by an older version may need that version."
        ) from error
    check(callable(found), "_target_", "a class or a function", name)
    return found


def check_arguments(function: Callable[..., Any], call: DictConfig) -> None:
    """Raise an error for arguments that a target does not accept, before a recipe is called much later.

    Args:
        function: The target.
        call: The node with its arguments.

    Raises:
        FewtokensError: The target has no argument of a name, or a value has the wrong type.
    """
    hints, any_name = argument_types(function)
    for name in map(str, call):
        if name in HYDRA_KEYS or (any_name and name not in hints):
            continue
        node = call._get_node(name)._dereference_node()  # type: ignore[union-attr]
        key = node._get_full_key(None) or name
        if name not in hints:
            raise unknown_argument(call._get_full_key(name), call["_target_"], name, hints)
        value = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node._value()
        check(fits(value, hints[name]), key, described(hints[name]), value)


def _reason(error: BaseException) -> BaseException:
    """Return the FewtokensError that caused Hydra's error, or one about the arguments, or a bug unchanged."""
    deepest = error
    while deepest.__cause__ is not None and not isinstance(deepest, FewtokensError):
        deepest = deepest.__cause__
    if isinstance(deepest, TypeError | ValueError | InstantiationException) and not isinstance(deepest, FewtokensError):
        lines = [first_line(error), *([first_line(deepest)] if deepest is not error else [])]
        return FewtokensError(f"{' '.join(lines).rstrip('.')}. Check its arguments.")
    return deepest


def save(cfg: DictConfig, directory: Path) -> None:
    """Write the config to the run directory, with interpolations, so that later overrides apply to what refers to them.

    A config that differs from the one before it, as after a resume, leaves that as `config.<n>.yaml`.

    Args:
        cfg: The config of the job.
        directory: The run directory.
    """
    text = OmegaConf.to_yaml(OmegaConf.create(plain(cfg)))
    path = directory / CONFIG
    if path.exists() and path.read_text(encoding="utf-8") != text:
        count = len(list(directory.glob("config.*.yaml")))
        shutil.copy(path, directory / f"config.{count}.yaml")
    with replace_file(path) as file:
        file.write(text)


def plain(cfg: DictConfig, resolve: bool = False) -> dict[str, Any]:
    """Return the saved part of a config as plain values, with secrets masked.

    Args:
        cfg: The config of the job.
        resolve: Replace interpolations by their values, instead of keeping their text.
    """
    container = OmegaConf.to_container(cfg, resolve=resolve)
    assert isinstance(container, dict)
    return masked({str(key): value for key, value in container.items() if key not in NOT_SAVED})
