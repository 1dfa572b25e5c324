"""The exception that users see, and the checks that raise it."""

import errno
import pickle

import pytest

from fewtokens.errors import FewtokensError, check, check_choice, write_error


def test_the_message_is_the_text_of_the_error() -> None:
    assert str(FewtokensError("Tokens are few. Drop one.")) == "Tokens are few. Drop one."


def test_it_is_a_value_error_so_that_generic_handlers_see_it() -> None:
    assert issubclass(FewtokensError, ValueError)


def test_it_crosses_processes() -> None:
    error = FewtokensError("`data.root` is missing.")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is FewtokensError
    assert str(again) == str(error)


def test_check_names_the_setting_what_is_expected_and_what_was_found() -> None:
    check(True, "data.batch_size", "an int >= 1", 1)
    with pytest.raises(FewtokensError, match=r"^`data.batch_size` must be an int >= 1, got 0\.$"):
        check(False, "data.batch_size", "an int >= 1", 0)


def test_check_choice_names_the_choices_and_the_nearest_one() -> None:
    check_choice("data.decoder", "pyav", ("decord", "pyav"))
    with pytest.raises(
        FewtokensError, match=r"^`data.decoder` must be 'decord' or 'pyav', got 'pyaw'. Did you mean 'p"
    ):
        check_choice("data.decoder", "pyaw", ("decord", "pyav"))
    with pytest.raises(FewtokensError, match=r"got None\.$"):
        check_choice("data.decoder", None, ("decord", "pyav"))


def test_write_error_says_what_the_system_said() -> None:
    assert "Cannot write a.csv: No space left on device." in str(
        write_error("a.csv", OSError(errno.ENOSPC, "No space left on device"))
    )
