"""The check that the saved config of a run, which may come from somebody else, is nothing but data."""

import copy
import inspect
import os
import re
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from fewtokens.errors import FewtokensError
from fewtokens.runs.config import CONFIGS, NAME, target_of

# An environment variable, since a config must not be able to extend the list.
ALLOW_VARIABLE = "FEWTOKENS_ALLOW_TARGETS"
# References to other keys. Resolvers, which can read the environment or build objects, are not allowed.
REFERENCE = re.compile(r"\$\{\s*(?:[\w.\[\]]+|oc\.select:[\w.]+(?:,\w+)?)\s*\}")
TARGET = re.compile(r"_target_: *([\w.]+)")
KEY = re.compile(r"[\w.\-@/ ]*")
# What each group may build, out of the targets that the project's own configs use and of COMMON.
KINDS = {
    "backbone": ("fewtokens.backbones.", "fewtokens.layers.embedding."),
    "callbacks": ("fewtokens.callbacks.", "lightning.pytorch.callbacks."),
    "data": ("fewtokens.data.",),
    "init_image": ("fewtokens.backbones.image_init.",),
    "logger": ("fewtokens.callbacks.loggers.", "lightning.pytorch.loggers."),
    "measure": ("fewtokens.analysis.",),
    "optimizer": ("torch.optim.", "timm.optim."),
    "schedule": ("fewtokens.tasks.optim.",),
    "task": ("fewtokens.tasks.",),
    "tokenizer": ("fewtokens.tokenizers.",),
    "trainer": ("lightning.pytorch.Trainer",),
}
COMMON = {
    *(f"torch.optim.{name}" for name in ("Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "SGD")),
    *(f"lightning.pytorch.callbacks.{name}" for name in ("EarlyStopping", "ModelCheckpoint", "LearningRateMonitor")),
    "fewtokens.data.transforms.geometric.CenterCrop",
}
MOVING_DIGITS = "fewtokens.data.video.moving_digits.MovingDigits"  # writes its videos if they do not exist
LARGEST = 20_000  # nodes; the project's largest config has 200
WRITES = ("callbacks", "logger", "trainer", "measure")  # groups whose objects write files
FOLDERS = ("directory", "dirpath", "save_dir", "path", "default_root_dir", "cache_dir")  # arguments that say where
IN_RUN = re.compile(r"\$\{paths\.run\}(/[\w.\-]+)*")
NAMES = re.compile(r"\$\{(name|seed|paths\.run)\}")  # references that name no other folder
# A command has its own: where it writes, Hydra's settings, and what it composes.
IGNORED = ("paths", "hydra", "defaults", "resume", "checkpoint", "sweep", "experiment", "export")


def check_saved(config: dict[str, Any], path: Path, replaced: Collection[str] = ()) -> dict[str, Any]:
    """Return the groups and values of a saved config that a command may compose on.

    Args:
        config: The config as plain data.
        path: The checkpoint that it belongs to, for the error message.
        replaced: Groups and keys that the command line sets, or with a prefix `~` deletes, so that the values in the
            saved config are not used.

    Raises:
        FewtokensError: A value uses a resolver or another composition, a node builds what is not of its group, or
            something would be written outside of the run directory.
    """
    checked = {str(key): node for key, node in config.items() if key not in IGNORED}
    checked = _without(checked, replaced)
    name = checked.get("name", "run")
    if not (isinstance(name, str) and NAME.fullmatch(name)) and "name" not in replaced:
        raise _unsafe(path, "name", f"{name!r} is not the name of a folder below outputs/")
    for number, (key, value) in enumerate(_values(checked)):
        if number > LARGEST:
            raise _unsafe(path, key, f"the config has more than {LARGEST} values")
        if reason := _reason(key, value):
            raise _unsafe(path, key, reason)
    data, paths = checked.get("data"), config.get("paths")
    if isinstance(data, dict):
        checked["data"] = _only_read(data)
    folder = paths.get("data") if isinstance(paths, dict) else None
    # Where data are read, unless it is the default, which refers to an environment variable, or where they are written.
    known = isinstance(folder, str) and "${" not in folder and checked["data"] == data
    return checked | ({"paths": {"data": folder}} if known else {})


def _reason(key: str, value: Any) -> str | None:
    """Return what a node of a saved config would do other than being data, or None."""
    group, leaf = key.partition(".")[0], key.rpartition(".")[2]
    text = value if isinstance(value, str) else ""
    if "${" in REFERENCE.sub("", text.replace("\\$", "${:")):
        return f"{value!r} uses a resolver, and only references to other keys are allowed"
    if leaf in ("defaults", "_args_") or not KEY.fullmatch(key) or "../" in key:
        return "a key like this would change the composition"
    if leaf == "_target_":
        return None if value is None or _allowed(group, str(value)) else f"{value!r} is no {group} of this project"
    in_run = IN_RUN.fullmatch(text) and ".." not in Path(text).parts
    if not in_run and ((leaf in FOLDERS and value is not None) or (group in WRITES and _leaves(text))):
        return f"{value!r} is outside of the run directory"
    return None


def _without(config: dict[str, Any], replaced: Collection[str]) -> dict[str, Any]:
    """Return the config with nothing in the nodes that the command line sets, or deletes (`~key`)."""
    config = copy.deepcopy(config)
    for key in replaced:
        node, (*parents, leaf) = config, key.lstrip("~").split(".")
        for parent in parents:
            node = node.get(parent, {}) if isinstance(node, dict) else {}
        if isinstance(node, dict) and leaf in node:
            # Hydra deletes what is not null.
            node[leaf] = {} if isinstance(node[leaf], dict) or key.startswith("~") else None
    return config


def _only_read(data: dict[str, Any]) -> dict[str, Any]:
    """Return the data group so that only the command line can ask for a download, or say where data are written."""
    found = data | ({"download": False} if data.get("download") else {})
    return found | ({"root": "${paths.data}/moving_digits"} if data.get("_target_") == MOVING_DIGITS else {})


def _values(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the dotted key of every node, and its value if it is no mapping or list."""
    nodes: list[tuple[str, Any]] = [("", config)]  # without recursion, since aliases in yaml can make a circle
    while nodes:
        prefix, node = nodes.pop()
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield f"{prefix}{key}", None if isinstance(value, dict | list) else value
            if isinstance(value, dict | list):
                nodes.append((f"{prefix}{key}.", value))


def _allowed(group: str, target: str) -> bool:
    known = target in COMMON | _project_targets() and target.startswith(KINDS.get(group, ()))
    return known or _trusted(target)


@cache
def _project_targets() -> frozenset[str]:
    """Return all targets in the project's own configs."""
    return frozenset(target for file in CONFIGS.rglob("*.yaml") for target in TARGET.findall(file.read_text()))


def _trusted(target: str) -> bool:
    """Return whether a target is defined in a package that the environment allows.

    A prefix alone is no boundary: `mine.os.system` exists if the module `mine` imports os. So the class or function
    must be defined at the top of a module of the package.
    """
    packages = [package for package in os.environ.get(ALLOW_VARIABLE, "").split(",") if package]
    if not _is_below(target, packages):
        return False
    found = target_of(target)
    home, name = getattr(found, "__module__", ""), getattr(found, "__qualname__", ".")
    return (inspect.isclass(found) or inspect.isfunction(found)) and "." not in name and _is_below(home, packages)


def _is_below(name: str, packages: Collection[str]) -> bool:
    return any(f"{name}.".startswith(f"{package.rstrip('.')}.") for package in packages)


def _leaves(value: str) -> bool:
    """Return whether a value may name a place outside of the run directory. Other names have no such prefix."""
    outside = value.startswith(("/", "~", "\\")) or "://" in value or ".." in re.split(r"[/\\]", value)
    return outside or "${" in NAMES.sub("", value)


def _unsafe(path: Path, key: str, reason: str) -> FewtokensError:
    name = key if KEY.fullmatch(key) else ascii(key)
    return FewtokensError(
        f"The config of {path} is not used, since `{name}` in it is not plain data: {reason}. If you know that it is "
        f"right, set `{name}` on the command line, or choose an option of the project for its group. Allow a package "
        f"of your own, and all that is defined in it, with the environment variable {ALLOW_VARIABLE}=<package>."
    )
