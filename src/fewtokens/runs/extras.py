"""The settings in `extras`, which act before a run starts: printing the config and asking for tags."""

import sys
import warnings
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.prompt import Prompt
from rich.syntax import Syntax
from rich.tree import Tree

from fewtokens.errors import FewtokensError, check
from fewtokens.runs import config
from fewtokens.runs.distributed import is_rank_zero


def apply(cfg: DictConfig) -> None:
    """Apply `extras` and check `tags`.

    Raises:
        FewtokensError: `tags` is no list of words, or there are none although `extras.enforce_tags` wants some.
    """
    settings = cfg.extras
    for name in ("print_config", "enforce_tags", "ignore_warnings"):
        check(isinstance(settings.get(name), bool), f"extras.{name}", "true or false", settings.get(name))
    if settings.ignore_warnings:
        warnings.filterwarnings("ignore")
    if not is_rank_zero():  # the others have nothing to print, and log nothing
        return
    if settings.enforce_tags and not cfg.tags:
        cfg.tags = _ask_for_tags()
    tags = OmegaConf.to_container(cfg.tags) if OmegaConf.is_list(cfg.tags) else cfg.tags
    check(isinstance(tags, list) and all(isinstance(tag, str) for tag in tags), "tags", "a list of words", tags)
    if settings.print_config:
        Console().print(tree(config.plain(cfg)))


def tree(content: dict[str, Any]) -> Tree:
    """Return the groups of a config as a tree, with the values of each as yaml."""
    root = Tree("config")
    for key, value in content.items():
        if isinstance(value, dict) and value:
            root.add(str(key)).add(Syntax(yaml.safe_dump(value, sort_keys=False).rstrip(), "yaml"))
        else:
            root.add(f"{key}: {value}")
    return root


def _ask_for_tags() -> list[str]:
    if not sys.stdin.isatty():
        raise FewtokensError("`tags` must not be empty with extras.enforce_tags=true. Add them: 'tags=[baseline,try]'")
    given = Prompt.ask("Tags of this run, separated by commas")
    tags = [tag.strip() for tag in given.split(",") if tag.strip()]
    return tags or _ask_for_tags()
