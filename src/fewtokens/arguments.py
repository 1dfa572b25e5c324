"""Checks of the arguments of a function by its signature, before it is called."""

import collections.abc
import difflib
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

from fewtokens.errors import FewtokensError


def unknown_argument(key: str, function: str, name: str, known: Iterable[str]) -> FewtokensError:
    """Return the error for an argument that a function does not have, with the nearest name that it has.

    Args:
        key: The argument as the user wrote it, possibly with its path in the config.
        function: The function's name.
        name: The argument's name.
        known: Names of the arguments that the function has.
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean `{near[0]}`?" if near else f"It accepts {', '.join(known) or 'none'}."
    return FewtokensError(f"`{key}`: {function} has no argument `{name}`. {hint}")


def argument_types(function: Callable[..., Any]) -> tuple[dict[str, Any], bool]:
    """Return the type of each argument, and whether the function accepts any other name."""
    try:
        annotations = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)  # type: ignore[misc]
    except Exception:  # names that are imported for type checkers only, and what else a package writes there
        annotations = {}
    hints: dict[str, Any] = {}
    any_name = False
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some functions written in C have no signature
        return hints, True
    for parameter in parameters:
        hint = annotations.get(parameter.name, Any)
        if parameter.kind is parameter.VAR_KEYWORD and typing.get_origin(hint) is typing.Unpack:
            hints |= typing.get_type_hints(typing.get_args(hint)[0])
        elif parameter.kind is parameter.VAR_KEYWORD:
            any_name = True
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            hints[parameter.name] = typing.Optional[hint] if parameter.default is None else hint  # noqa: UP045
    return hints, any_name


def fits(value: Any, hint: Any) -> bool:
    """Return whether a plain value may have a type, as far as this can be decided: whether it is of the right kind."""
    origin = typing.get_origin(hint) or hint
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin in (int, float, str, bool, types.NoneType):
        known = type(value) in ((int, float) if origin is float else (origin,))
        return known and not (isinstance(value, float) and math.isnan(value))
    if origin is tuple and isinstance(value, list) and (parts := typing.get_args(hint)) and ... not in parts:
        return len(value) == len(parts) and all(map(fits, value, parts))
    if isinstance(value, dict | list) or not inspect.isclass(origin) or origin is object:
        return True
    collection = issubclass(origin, collections.abc.Iterable | collections.abc.Callable) and not issubclass(origin, str)
    return isinstance(value, str) and not collection and not origin.__module__.startswith("fewtokens.")


def described(hint: Any) -> str:
    """Return a type in the words of an error: "an int or null"."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(described(part) for part in typing.get_args(hint))
    names = {int: "an int", float: "a number", str: "a string", bool: "true or false", types.NoneType: "null"}
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple and ... not in typing.get_args(hint):
        return f"[{', '.join(map(described, typing.get_args(hint)))}]"
    return names.get(hint) or str(getattr(typing.get_origin(hint) or hint, "__name__", hint))
