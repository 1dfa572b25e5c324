"""The exception for input and configuration that cannot be used, and the checks that raise it."""

import difflib
from collections.abc import Iterable, Sequence


class FewtokensError(ValueError):
    """Input or configuration that cannot be used.

    Its message is one or two sentences: what was wrong, what is expected, and what to change. Commands print it without
    a traceback and exit with code 1. Of any other exception they print type, message and place. HYDRA_FULL_ERROR=1
    prints the traceback of both.
    """


def check(condition: bool, name: str, expected: str, got: object) -> None:
    """Raise an error if a setting has a value that it cannot have.

    Args:
        condition: Whether the value is valid.
        name: The setting, as it is written on the command line: "data.batch_size".
        expected: The valid values: "an int >= 1".
        got: The value.

    Raises:
        FewtokensError: "`data.batch_size` must be an int >= 1, got 0."
    """
    if not condition:
        raise FewtokensError(f"`{name}` must be {expected}, got {got!r}.")


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raise an error if a setting is not one of its choices.

    Args:
        name: The setting, as it is written on the command line.
        value: Its value.
        choices: The valid values.

    Raises:
        FewtokensError: "`data.decoder` must be 'decord' or 'pyav', got 'pyaw'. Did you mean 'pyav'?"
    """
    choices = list(choices)
    if value not in choices:
        near = difflib.get_close_matches(str(value), [choice for choice in choices if isinstance(choice, str)], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise FewtokensError(f"`{name}` must be {' or '.join(map(repr, choices))}, got {value!r}.{hint}")


def write_error(path: object, error: OSError) -> FewtokensError:
    """Return the error for a file that the operating system does not let us write."""
    return FewtokensError(f"Cannot write {path}: {error.strerror or error}. Free some space or choose another path.")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that is not blank, or the error's type if it has no message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def listed(names: Sequence[str]) -> str:
    """Return the first five names for a message and, if there are more, their number; "none" without any."""
    more = f" ... ({len(names)} in all)" if len(names) > 5 else ""
    return (", ".join(names[:5]) or "none") + more
