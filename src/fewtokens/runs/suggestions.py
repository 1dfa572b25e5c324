"""The nearest valid name for a misspelt override."""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from fewtokens.errors import FewtokensError

KEY = re.compile(
    r"(?:Could not override|Could not append to config. An item is already at|Could not delete.*?) '([^']+)'"
)
OPTION = re.compile(
    r"Could not find '([^']+)'|Cannot find primary config '([^']+)'|In '[^']*': Could not (?:find|load) '([^']+)'"
)


def explain(error: Exception, folder: Path, name: str) -> FewtokensError:
    """One sentence for Hydra's error: the rule, what was found, and the nearest valid name.

    Args:
        error: What Hydra or OmegaConf raised.
        folder: Of the configs.
        name: Of the primary config.
    """
    text = str(error)
    if found := OPTION.search(text):
        return _option(next(part for part in found.groups() if part), folder)
    if found := KEY.search(text):
        return _key(found.group(1), folder, name)
    first = " ".join(line.strip() for line in text.splitlines()[:2])
    return FewtokensError(
        "Overrides are group=option or key=value",
        expected="what python train.py --help lists",
        got=first,
        fix="quote values that hold commas, spaces or brackets: 'tokenizer.at=[3,6,9]'",
    )


def _option(path: str, folder: Path) -> FewtokensError:
    group, _, option = path.partition("/")
    options = sorted(str(file.relative_to(folder / group).with_suffix("")) for file in (folder / group).rglob("*.yaml"))
    return FewtokensError(
        f"{group} is chosen by the name of a file in configs/{group}/",
        expected=f"one of {', '.join(options)}",
        got=f"{group}={option}",
        fix=_did_you_mean(option, options, f"{group}="),
    )


def _key(key: str, folder: Path, name: str) -> FewtokensError:
    groups = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_dir())
    keys = sorted({*_keys(_composed(folder, name)), *groups})
    plain = key.partition("@")[0]
    siblings = [k for k in keys if k.rpartition(".")[0] == plain.rpartition(".")[0]]
    return FewtokensError(
        "An override names a key or a group of the config",
        expected=f"one of {', '.join(siblings or groups)}",
        got=key,
        fix=_did_you_mean(plain, keys, "") + "; a key that is really new is added with +key=value",
    )


def _did_you_mean(wrong: str, names: list[str], prefix: str) -> str:
    leaf = wrong.rpartition(".")[2]
    near = [name for name in names if name.rpartition(".")[2] == leaf]  # the right name in the wrong place
    near = near or difflib.get_close_matches(wrong, names, n=1, cutoff=0.4)
    return f"did you mean {prefix}{near[0]}?".rstrip("?") if near else "see python train.py --help"


def _composed(folder: Path, name: str) -> Any:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(folder.resolve()), version_base="1.3"):
        return compose(name)


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted key, without resolving anything."""
    for key in node:
        yield f"{prefix}{key}"
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not (child._is_interpolation() or child._is_none() or child._is_missing()):
            yield from _keys(child, f"{prefix}{key}.")
