"""The DataLoader of all data sets: whole batches from the data set, errors of workers as they were raised."""

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from fewtokens.errors import FewtokensError


class Loader(DataLoader):
    """A DataLoader that re-raises a FewtokensError of a worker unchanged.

    torch would wrap it into a RuntimeError made of a traceback, so the data set hands it over as if it were a batch.

    Args:
        receive: Called in this process with every batch; returns the batch to train on, or None to pass over it.
        settings: Those of DataLoader.
    """

    def __init__(self, *settings: Any, receive: Callable[[Any], Any] | None = None, **more: Any) -> None:
        super().__init__(*settings, **more)
        self.receive = receive

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, FewtokensError):
                raise batch
            received = batch if self.receive is None else self.receive(batch)
            if received is not None:
                yield received

    # The position in the epoch travels in the datamodule's state; Lightning warns of every resumed loader that lacks
    # these two methods.
    def state_dict(self) -> dict[str, Any]:
        """Nothing: see `DataModule.state_dict`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing: see `DataModule.load_state_dict`."""


def whole(batch: Any) -> Any:
    """The collate function for data sets whose `__getitems__` already returns a batch."""
    return batch
