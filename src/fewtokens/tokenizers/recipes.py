"""The methods by name, with the defaults of `configs/tokenizer`, for use without Hydra."""

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, get_origin

import yaml

from fewtokens.arguments import argument_types, described, fits, unknown_argument
from fewtokens.errors import check, check_choice
from fewtokens.files import CONFIGS
from fewtokens.tokenizers.base import LayerContext, Tokenizer

Method = str | Callable[..., Tokenizer]
# A config that chooses another tokenizer, as that of TokenFuser does, has this default for an argument.
CHOICE = "/tokenizer@"


def methods() -> dict[str, str]:
    """Return the names of all methods, each with one line about it: the first line of its file in `configs/tokenizer`.

    `reduce` takes these names, and so does `tokenizer=` on the command line.
    """
    lines = {path.stem: path.read_text(encoding="utf-8").splitlines()[0] for path in _folder().glob("*.yaml")}
    return {name: lines[name].removeprefix("# ") for name in sorted(lines)}


def recipe(method: Method, at: Any, arguments: Mapping[str, Any]) -> tuple[Any, Callable[[LayerContext], Tokenizer]]:
    """Return the blocks and the recipe of a method, as the config of `tokenizer=<method>` describes them.

    Args:
        method: A name from `methods`, or a subclass of `Tokenizer` or a function, called as `method(context, ...)`.
        at: The blocks that get a tokenizer, see `fewtokens.backbones.encoder.block_indices`; None for those of the
            method's config. A class or function has no config, so that `at` must be given.
        arguments: Arguments of the method. The others have the values of its config.

    Raises:
        FewtokensError: There is no such method, it has no such argument, or a value is of the wrong type.
    """
    if isinstance(method, str):
        build, default_at, arguments = _from_config(method, arguments)
        return default_at if at is None else at, partial(build, **arguments)
    check(callable(method), "method", "a name from fewtokens.methods(), or a subclass of Tokenizer", method)
    check(at is not None, "at", "given for a class, such as at=[3, 6, 9]", at)
    name = getattr(method, "__name__", "the method")
    return at, partial(method, **_checked(name, method, arguments))


def _from_config(method: str, arguments: Mapping[str, Any]) -> tuple[Callable[..., Tokenizer], Any, dict[str, Any]]:
    check_choice("method", method, methods())
    config = yaml.safe_load((_folder() / f"{method}.yaml").read_text(encoding="utf-8"))
    build = config["build"]
    module, _, name = build["_target_"].rpartition(".")
    function = getattr(importlib.import_module(module), name)
    choices = {
        key.removeprefix(CHOICE): chosen
        for entry in config.get("defaults", ())
        for key, chosen in (entry.items() if isinstance(entry, dict) else ())
    }
    defaults = {key: value for key, value in build.items() if not key.startswith("_")}
    merged = defaults | choices | _checked(method, function, arguments)
    for key in choices:  # inner="pool" of TokenFuser
        merged[key] = recipe(merged[key], 0, {})[1]
    return function, config["at"], merged


def _checked(method: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments, with lists in place of tuples, after a check of their names and types."""
    types, any_name = argument_types(function)
    types.pop("context", None)
    checked = {key: list(value) if isinstance(value, tuple) else value for key, value in arguments.items()}
    for key, value in checked.items():
        if key not in types:
            if any_name:
                continue
            raise unknown_argument(key, method, key, types)
        by_name = get_origin(types[key]) is Callable and isinstance(value, str)  # another method
        check(callable(value) or by_name or fits(value, types[key]), key, described(types[key]), value)
    return checked


def _folder() -> Any:
    return CONFIGS / "tokenizer"
