"""The exception that users see."""

import pickle

from fewtokens.errors import FewtokensError


def test_it_says_rule_expectation_finding_and_remedy_in_one_sentence_each() -> None:
    error = FewtokensError("Tokens are few.", expected="8", got=9, fix="drop one.")
    assert str(error) == "Tokens are few. Expected: 8. Found: 9. To do: drop one."


def test_its_parts_can_be_read_by_themselves() -> None:
    error = FewtokensError("rule", expected=(1, 2), got=None, fix="fix")
    assert (error.rule, error.expected, error.got, error.fix) == ("rule", (1, 2), None, "fix")


def test_it_is_a_value_error_so_that_generic_handlers_see_it() -> None:
    assert issubclass(FewtokensError, ValueError)


def test_it_crosses_processes() -> None:
    error = FewtokensError("rule", expected="this", got="that", fix="mend")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is FewtokensError
    assert str(again) == str(error)
    assert again.fix == "mend"
