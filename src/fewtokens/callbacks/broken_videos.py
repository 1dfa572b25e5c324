"""The limit on unreadable training videos or pictures, over all processes."""

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from fewtokens.data.unreadable import ReplacingDataModule


class BrokenVideos(Callback):
    """Ends training after an epoch in which all processes together found too many unreadable videos or pictures.

    A process reads only its share of them in an epoch, so that it can stay below `data.max_broken` alone.
    """

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the unreadable samples and check their number.

        Raises:
            FewtokensError: They are more than `max_broken` allows.
        """
        data = getattr(trainer, "datamodule", None)
        if trainer.world_size > 1 and isinstance(data, ReplacingDataModule):
            found = [data.broken] * trainer.world_size
            dist.all_gather_object(found, data.broken)
            data.check_broken(sorted({sample for part in found for sample in part}))
