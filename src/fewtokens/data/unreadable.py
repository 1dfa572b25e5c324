"""Unreadable samples: in training replaced by others of their class, noted, and limited in number."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Int64

from fewtokens.data import seeding
from fewtokens.data.datamodule import DataModule
from fewtokens.data.skipped import Skipped
from fewtokens.errors import FewtokensError, check

MAX_TRIES = 20  # for one sample: that many unreadable ones in a row are no accident


class UnreadableInARowError(FewtokensError):
    """A training sample and all that were tried in its place cannot be read.

    Args:
        skipped: All of them.
        noun: What the samples are, in the plural.
        remedy: What to do, as a sentence without its period.
    """

    def __init__(self, skipped: list[Skipped], noun: str, remedy: str) -> None:
        super().__init__(
            f"{len(skipped)} training {noun} in a row cannot be read; the last is {skipped[-1].path}: "
            f"{skipped[-1].reason}. {remedy}."
        )
        self.skipped, self.noun, self.remedy = skipped, noun, remedy

    def __reduce__(self) -> tuple:
        return UnreadableInARowError, (self.skipped, self.noun, self.remedy)


class ReplacingDataModule(DataModule):
    """Base class of datamodules whose training samples are replaced if they cannot be read. `skipped` lists them.

    A subclass sets `max_broken`, the largest share of unreadable training samples, and calls `note`.
    """

    noun: ClassVar[str] = "samples"
    remedy: ClassVar[str] = "Replace or remove them"
    max_broken: float

    def __init__(self, **common: Any) -> None:
        super().__init__(**common)
        self._unreadable: dict[tuple[str, str], Skipped] = {}  # by part and path, found while reading
        self.replaced, self.tested, self.untested = 0, 0, 0  # numbers of samples in this process

    def note(self, part: str, skipped: Sequence[Skipped]) -> None:
        """Count and log the samples of a batch that could not be read.

        Raises:
            FewtokensError: More training samples are unreadable than `max_broken` allows.
        """
        for sample in skipped:
            if (sample.part, sample.path) not in self._unreadable:
                done = "replaced" if sample.part == "train" else "skipped"
                text = "%s (%s part) cannot be read and is %s: %s"
                logging.getLogger(type(self).__module__).warning(text, sample.path, sample.part, done, sample.reason)
                self._unreadable[sample.part, sample.path] = sample
        if part == "train" and skipped:
            self.replaced += len(skipped)
            self.check_broken(self.broken)

    @property
    def skipped(self) -> list[Skipped]:
        """Return the samples skipped so far by this process, with the reason for each."""
        return list(self._unreadable.values())

    @property
    def broken(self) -> list[Skipped]:
        """Return the training samples that this process found unreadable."""
        return [sample for sample in self._unreadable.values() if sample.part == "train"]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of `DataModule` and the unreadable training samples."""
        state = super().state_dict()
        broken = [[sample.path, sample.reason] for sample in self.broken]
        return state and state | {"broken": broken, "replaced": self.replaced}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the position, the unreadable training samples and the number of replaced ones."""
        super().load_state_dict(state_dict)
        self.replaced = state_dict.get("replaced", 0)
        for path, reason in state_dict.get("broken", []):
            self._unreadable["train", path] = Skipped("train", path, reason)

    def check_broken(self, broken: Sequence[Skipped]) -> None:
        """Raise an error if too many training samples are unreadable.

        Each process checks what it has found itself. `fewtokens.callbacks.broken_videos` adds up what all have found.

        Raises:
            FewtokensError: They are more than `max_broken` allows.
        """
        size = len(self._part("train"))  # type: ignore[arg-type]
        if len(broken) > self.max_broken * size:
            raise FewtokensError(
                f"{len(broken)} of {size} training {self.noun} cannot be read, more than data.max_broken="
                f"{self.max_broken:g} allows; the last is {broken[-1].path}: {broken[-1].reason}. {self.remedy}, or "
                "raise `data.max_broken`."
            )

    def _check_max_broken(self) -> None:
        check(0 <= self.max_broken <= 1, "data.max_broken", "a float in [0, 1]", self.max_broken)


def candidates(groups: Int64[np.ndarray, " n"], seed: int, epoch: int, index: int) -> Iterator[int]:
    """Yield a sample and then others in random order: first those of the same group, then the rest.

    Args:
        groups: Group of every sample, for example its class.
        seed: The run's seed.
        epoch: Number of the epoch. The order depends on (seed, epoch, index) only.
        index: The sample.
    """
    yield index
    draws = seeding.generator(seeding.REPLACEMENT, seed, epoch, index)
    others = torch.randperm(len(groups), generator=draws).numpy()
    others = others[others != index]
    alike = groups[others] == groups[index]
    yield from np.concatenate([others[alike], others[~alike]])[: MAX_TRIES - 1].tolist()
