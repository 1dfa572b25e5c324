"""The limit on unreadable training videos, over all processes."""

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from fewtokens.data.video.datamodule import Videos


class BrokenVideos(Callback):
    """Ends training after an epoch in which all processes together found too many unreadable videos.

    A process reads only its share of the videos in an epoch, so that it can stay below `data.max_broken` alone.
    """

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the unreadable videos and check their number.

        Raises:
            FewtokensError: They are more than `max_broken` allows.
        """
        data = getattr(trainer, "datamodule", None)
        if trainer.world_size > 1 and isinstance(data, Videos):
            found = [data.broken] * trainer.world_size
            dist.all_gather_object(found, data.broken)
            data.check_broken(sorted({video for part in found for video in part}))
