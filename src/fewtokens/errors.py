"""The one exception for what a user can mend: it says the rule, the expectation, the finding and the remedy."""


class FewtokensError(ValueError):
    """A rule that input or configuration broke.

    The entry points print it as one sentence and exit with code 1; anything else that escapes is a bug and keeps its
    traceback.

    Args:
        rule: What holds, e.g. "TokenLearner 1.0 needs patches on a lattice".
        expected: What would have been right.
        got: What was found.
        fix: What to do about it.
    """

    def __init__(self, rule: str, *, expected: object, got: object, fix: str) -> None:
        super().__init__(rule, expected, got, fix)
        self.rule, self.expected, self.got, self.fix = rule, expected, got, fix

    def __str__(self) -> str:
        return f"{self.rule.rstrip('.')}. Expected: {self.expected}. Found: {self.got}. To do: {self.fix.rstrip('.')}."

    def __reduce__(self) -> tuple:  # keyword-only arguments, and workers send exceptions by pickle
        return _rebuild, self.args


def _rebuild(rule: str, expected: object, got: object, fix: str) -> FewtokensError:
    return FewtokensError(rule, expected=expected, got=got, fix=fix)


def unwritable(place: object, error: OSError) -> FewtokensError:
    """The error for a file that the system does not let us write."""
    return FewtokensError(
        "A file that is written needs room and permission",
        expected=f"that {place} can be written",
        got=error.strerror or error,
        fix="make room, or name another place",
    )
