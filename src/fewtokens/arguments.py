"""Checks of the arguments of a function by its signature, before it is called."""

import collections.abc
import difflib
import inspect
import math
import os
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
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in inner)
    if origin is typing.Literal:
        return value in inner
    if origin in (int, float, str, bool, types.NoneType):
        known = type(value) in ((int, float) if origin is float else (origin,))
        return known and not (isinstance(value, float) and math.isnan(value))
    if not inspect.isclass(origin) or origin in (object, Any) or _is_protocol(origin):
        return True
    if isinstance(value, dict | list):
        return _fits_collection(value, dict if typing.is_typeddict(origin) else origin, inner)
    collection = issubclass(origin, collections.abc.Iterable | collections.abc.Callable) and not issubclass(origin, str)
    return isinstance(value, str) and not collection and not origin.__module__.startswith("fewtokens.")


def _fits_collection(value: dict[Any, Any] | list[Any], origin: type, inner: tuple[Any, ...]) -> bool:
    if isinstance(value, dict):
        if "_target_" in value:  # what it builds is not known
            return True
        known = len(inner) == 2 and issubclass(origin, collections.abc.Mapping)
        return issubclass(dict, origin) and (not known or all(fits(part, inner[1]) for part in value.values()))
    if origin is tuple and ... not in inner and inner:
        return len(value) == len(inner) and all(map(fits, value, inner))
    known = len(inner) == 1 and issubclass(origin, collections.abc.Iterable)
    return _is_list(origin) and (not known or all(fits(part, inner[0]) for part in value))


def described(hint: Any) -> str:
    """Return a type in the words of an error: "an int or null"."""
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(described, inner))
    if origin is typing.Literal:
        return " or ".join(map(repr, inner))
    if origin is tuple and ... not in inner:
        return f"[{', '.join(map(described, inner))}]"
    names = {int: "an int", float: "a number", str: "a string", bool: "true or false", types.NoneType: "null"}
    if hint in names or not inspect.isclass(origin):
        return names.get(hint) or str(hint)
    return _described_class(origin, inner)


def _described_class(origin: type, inner: tuple[Any, ...]) -> str:
    if issubclass(origin, collections.abc.Mapping):
        known = len(inner) == 2 and inner[1] not in (object, Any)
        return f"a mapping with values that are each {described(inner[1])}" if known else "a mapping"
    if _is_list(origin):
        plural = {int: " of ints", float: " of numbers", str: " of strings"}
        return f"a list{plural.get(inner[0], '') if inner else ''}"
    if issubclass(origin, os.PathLike):
        return "a path"
    if origin.__name__ == "Callable":
        return "a callable (values with a _target_)"
    return origin.__name__


def _is_list(origin: type) -> bool:
    """Return whether a list of a config may become an instance of a class."""
    return not _is_protocol(origin) and (issubclass(list, origin) or origin in (tuple, set, frozenset))


def _is_protocol(origin: type) -> bool:
    return getattr(origin, "_is_protocol", False)  # issubclass raises an error for most of them
