"""The record of a sample that was not used. This module imports no torch."""

from typing import NamedTuple


class Skipped(NamedTuple):
    """A listed video or picture that was not used.

    Attributes:
        part: Part of the data set that lists it: "train", "val" or "test".
        path: Path as listed.
        reason: Why it was not used.
    """

    part: str
    path: str
    reason: str
