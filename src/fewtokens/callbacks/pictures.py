"""Pictures of the tokens during training, and gifs for clips."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from fewtokens.analysis.evaluation import unwrap_compiled
from fewtokens.analysis.pictures.sheet import draw, save_png
from fewtokens.analysis.pictures.token_maps import token_picture
from fewtokens.analysis.pictures.token_video import strip, write_gif
from fewtokens.errors import check

Picture = UInt8[np.ndarray, "height width 3"]


class Pictures(Callback):
    """Draws the tokens of the first validation samples after the validation of every n-th epoch, on rank 0.

    The picture is that of `analysis.pictures.token_maps`, or for clips that of `analysis.pictures.token_video`. It goes
    to `epoch_<number>.png` and to every logger that accepts images (Weights & Biases, TensorBoard). Clips also get
    `epoch_<number>.gif`, which goes to loggers that accept videos. If no tokenizer reduces anything, there is none.

    The samples are those that validation has loaded, and no random numbers are consumed, so that training and resuming
    are the same as without pictures. A callback that validates an average of the weights must come after this one,
    which then draws the average.

    Args:
        directory: Folder of the png files.
        every_n_epochs: Epochs from one picture to the next.
        num_images: Number of rows: images, or time steps of the first clips (at least one clip); fewer if this process
            has fewer.
        max_columns: Largest number of tokens, or of stages of a method that acts in many blocks.

    Raises:
        FewtokensError: A setting is out of range.
    """

    def __init__(self, directory: str, every_n_epochs: int = 1, num_images: int = 8, max_columns: int = 16) -> None:
        check(every_n_epochs >= 1, "callbacks.pictures.every_n_epochs", "an int >= 1", every_n_epochs)
        check(num_images >= 1, "callbacks.pictures.num_images", "an int >= 1", num_images)
        check(max_columns >= 1, "callbacks.pictures.max_columns", "an int >= 1", max_columns)
        self.directory, self.every_n_epochs = Path(directory), every_n_epochs
        self.num_images, self.max_columns = num_images, max_columns
        self._batches: list[tuple[Tensor, Tensor]] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the samples of the last epoch."""
        self._batches = []

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the first views and the targets of the first samples, as the model gets them."""
        missing = self.num_images - sum(len(images) for images, _ in self._batches)
        if missing > 0 and self._due(trainer):
            self._batches.append((batch[0][:missing, 0], batch[1][:missing]))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the samples, write the files and log them."""
        batches, self._batches = self._batches, []
        if not sum(len(images) for images, _ in batches):
            return
        task, path = pl_module, self.directory / f"epoch_{trainer.current_epoch + 1}.png"
        model, datamodule = unwrap_compiled(task.model), getattr(trainer, "datamodule", None)
        images, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
        images = images.to(next(task.parameters()).dtype)
        with isolate_rng():
            found = token_picture(model, images, self.max_columns, self.num_images, targets, datamodule)
        if not found:
            return
        over_time, video = found.steps > 1, path.with_suffix(".gif")
        if over_time:
            write_gif(found, video)
            picture = strip(found, self.max_columns)
        else:
            picture = draw(found.columns, found.row_labels, found.legend)
        save_png(picture, path)
        for logger in trainer.loggers:
            log_picture(logger, "val/token_maps", np.asarray(picture), trainer.global_step, found.caption)
            if over_time:
                log_video(logger, "val/token_maps_video", video, trainer.global_step, found.caption)

    def _due(self, trainer: Trainer) -> bool:
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0
        return due and trainer.is_global_zero and not trainer.sanity_checking


def log_picture(logger: Logger, name: str, picture: Picture, step: int, caption: str = "") -> None:
    """Log a picture, if the logger accepts pictures.

    Args:
        logger: Any logger.
        name: Name of the picture.
        picture: (H, W, 3).
        step: Training step of the picture.
        caption: Text below the picture, in Weights & Biases.
    """
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, picture, step, dataformats="HWC")
    elif hasattr(logger, "log_image"):  # Weights & Biases, and loggers with the same method
        logger.log_image(name, [picture], step=step, caption=[caption])


def log_video(logger: Logger, name: str, path: Path, step: int, caption: str = "") -> None:
    """Log a gif, if the logger accepts gifs: Weights & Biases does. TensorBoard would need another package to do it.

    Args:
        logger: Any logger.
        name: Name of the video.
        path: Path of the gif.
        step: Training step of the video.
        caption: Text below the video.
    """
    if hasattr(logger, "log_video"):
        logger.log_video(name, [str(path)], step=step, caption=[caption])
