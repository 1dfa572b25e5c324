"""The check that the saved config of a run, which may come from somebody else, is nothing but data."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from fewtokens.errors import FewtokensError
from fewtokens.runs.config import ALLOW_VARIABLE, CONFIGS, is_below, trusted_packages

# References to other keys. Resolvers, which can read the environment or build objects, are not allowed.
REFERENCE = re.compile(r"\$\{\s*(?:[\w.\[\]]+|oc\.select:[\w.]+(?:,\w+)?)\s*\}")
TARGET = re.compile(r"_target_: *([\w.]+)")
NAME = re.compile(r"[\w][\w.\- ]*(?:/[\w][\w.\- ]*)*")
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
WRITES = ("callbacks", "logger")  # groups whose objects write files
# A command has its own: where it writes, Hydra's settings, and what it composes.
IGNORED = ("paths", "hydra", "defaults", "resume", "checkpoint", "experiment")


def check_saved(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the groups and values of a saved config that a command may compose on.

    Args:
        config: The config as plain data.
        path: The checkpoint that it belongs to, for the error message.

    Raises:
        FewtokensError: A value uses a resolver or another composition, a node builds what is not of its group, or
            something would be written outside of the run directory.
    """
    checked = {key: node for key, node in config.items() if key not in IGNORED}
    name = checked.get("name", "run")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise _unsafe(path, "name", f"{name!r} is not the name of a folder below outputs/")
    for key, value in _values(checked):
        group, leaf = key.partition(".")[0], key.rpartition(".")[2]
        if isinstance(value, str) and "${" in REFERENCE.sub("", value.replace("\\$", "${:")):
            raise _unsafe(path, key, f"{value!r} uses a resolver, and only references to other keys are allowed")
        if leaf == "defaults" or not re.fullmatch(r"[\w.\-@/ ]*", key) or "../" in key:
            raise _unsafe(path, key, "a key like this would change the composition")
        if leaf == "_target_" and not _allowed(group, str(value)):
            raise _unsafe(path, key, f"{value!r} is no {group} of this project")
        if group in WRITES and isinstance(value, str) and leaf != "_target_" and _leaves(value):
            raise _unsafe(path, key, f"{value!r} is outside of the run directory")
    data = config["paths"].get("data") if isinstance(config.get("paths"), dict) else None
    # Where data are read, unless it is the default, which refers to an environment variable.
    return checked | ({"paths": {"data": data}} if isinstance(data, str) and "${" not in data else {})


def _values(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key of every node, and its value if it is no mapping or list."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        yield f"{prefix}{key}", None if isinstance(value, dict | list) else value
        if isinstance(value, dict | list):
            yield from _values(value, f"{prefix}{key}.")


def _allowed(group: str, target: str) -> bool:
    known = target in COMMON | _project_targets() and target.startswith(KINDS.get(group, ()))
    return known or is_below(target, trusted_packages())


@cache
def _project_targets() -> frozenset[str]:
    """Return all targets in the project's own configs."""
    return frozenset(target for file in CONFIGS.rglob("*.yaml") for target in TARGET.findall(file.read_text()))


def _leaves(value: str) -> bool:
    """Return whether a path is not below the run directory. Names without a slash are no paths."""
    inside = value.startswith("${paths.run}") and ".." not in Path(value).parts
    return not inside and (value.startswith(("/", "~", "\\")) or ".." in Path(value).parts or "${paths." in value)


def _unsafe(path: Path, key: str, reason: str) -> FewtokensError:
    return FewtokensError(
        f"The config of {path} is not used, since `{key}` in it is not plain data: {reason}. Set the value on the "
        f"command line if you trust it, or allow packages of your own with {ALLOW_VARIABLE}=<package>."
    )
