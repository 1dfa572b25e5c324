"""Checks of values by the type of an argument."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypedDict

import pytest
from torch import Tensor, nn

from fewtokens.arguments import described, fits


class Sized(Protocol):
    def size(self) -> int: ...


class Known(TypedDict):
    a: int


OBJECT = {"_target_": "torch.nn.Identity"}


@pytest.mark.parametrize(
    ("hint", "fitting", "others", "words"),
    [
        (int, [1], [1.0, True, "1", None], "an int"),
        (float | None, [1, 0.5, None], [float("nan"), "1"], "a number or null"),
        (Mapping[str, str | None], [{}, {"a": "b", "c": None}], [{"a": True}, [], "a"],
         "a mapping with values that are each a string or null"),
        (Mapping[str, Any], [{"a": 1}], [["a"], 3], "a mapping"),
        (Sequence[float], [[], [1, 0.5]], [["a"], [None], 0.5], "a list of numbers"),
        (Iterable[nn.Module], [[OBJECT]], [[3], "a"], "a list"),
        (int | Sequence[int], [2, [2, 3]], [[0.5], "2"], "an int or a list of ints"),
        (tuple[float, float], [[0.5, 1]], [[0.5], [0.5, "1"]], "[a number, a number]"),
        (nn.Module, [OBJECT], [3, ["a"], {"a": 1}], "Module"),
        (Callable[[int], int], [OBJECT], ["a", 3, ["a"]], "a callable (values with a _target_)"),
        (Path, ["a"], [3, ["a"]], "a path"),
        (Known, [{"a": 1}], [[1], 3], "a mapping"),
        (float | Tensor, [1, 0.5], [[1.0], "a", None], "a number or Tensor"),
        (Sized, [[1], {"a": 1}, 3], [], "Sized"),
        (set[int], [[1]], ["a"], "a list of ints"),
    ],
)  # fmt: skip
def test_values_fit_or_the_error_says_what_would(hint: Any, fitting: list, others: list, words: str) -> None:
    assert all(fits(value, hint) for value in fitting)
    assert not any(fits(value, hint) for value in others)
    assert described(hint) == words


def test_anything_fits_an_argument_of_any_type() -> None:
    assert all(fits(value, Any) for value in (3, None, [1], {"a": 1}))
