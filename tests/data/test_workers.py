"""Worker processes of data loaders: what is said of one that has ended."""

import os
import re
import signal
from typing import Any

import pytest
from torch.utils.data import Dataset

from fewtokens.data.datamodule import Loader
from fewtokens.data.workers import lost_worker


class Kills(Dataset):
    """Ends the process that loads it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        os.kill(os.getpid(), self.number)


def test_a_worker_that_ran_out_of_memory_is_named() -> None:
    with pytest.raises(RuntimeError) as found:
        list(Loader(Kills(signal.SIGKILL), num_workers=1))
    said = str(lost_worker(found.value))  # torch notices the signal or only the end, whichever comes first
    assert re.fullmatch(
        r"A process that loads data \(\d+\) (was ended \(killed\), as by .*|has ended, see above.*)", said
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            "DataLoader worker (pid 12) is killed by signal: Bus error. It is possible that",
            "/dev/shm) is full. Enlarge it",
        ),
        (
            "DataLoader worker (pid(s) 12, 13) exited unexpectedly",
            "A process that loads data (12, 13) has ended, see above. Often memory has run out",
        ),
        (
            "DataLoader worker (pid 12) is killed by signal: Aborted. ",
            "A process that loads data (12) was ended (aborted).",
        ),
    ],
)
def test_torchs_words_become_a_sentence(error: str, said: str) -> None:
    assert said in str(lost_worker(RuntimeError(error)))


def test_other_errors_are_not_about_workers() -> None:
    assert lost_worker(RuntimeError("a worker of another kind")) is None
