"""Pictures of where the tokens look, as training goes on; of clips a gif, too."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from torch import Tensor

from fewtokens.analysis.cost import plain
from fewtokens.analysis.pictures.drawing import draw, pixels
from fewtokens.analysis.pictures.token_maps import token_columns
from fewtokens.analysis.pictures.token_video import strip, write_gif
from fewtokens.errors import FewtokensError

Picture = UInt8[np.ndarray, "height width 3"]


class Pictures(Callback):
    """Draws the first validation images at the end of every n-th epoch's validation, on rank 0.

    The picture goes to `epoch_<number>.png` in a directory, and to every logger that takes images (Weights & Biases,
    TensorBoard). It is that of `analysis.pictures.token_maps`, for clips that of `analysis.pictures.token_video`,
    with `epoch_<number>.gif`, which goes to loggers that take videos. Where no tokenizer reduces anything there is
    none. The images are those that validation has loaded anyway, and no random numbers are used up: training and its
    resuming go on as without. Next to a callback that validates an average of the weights it stands first, and draws
    the average.

    Args:
        directory: Of the png files.
        every_n_epochs: Epochs from one picture to the next.
        num_images: Rows, or time steps of the first clips (one clip at least); fewer if this process has fewer.
        max_columns: At most so many tokens, or stages of a method that acts in many blocks.
    """

    def __init__(self, directory: str, every_n_epochs: int = 1, num_images: int = 8, max_columns: int = 16) -> None:
        if min(every_n_epochs, num_images, max_columns) < 1:
            raise FewtokensError(
                "Pictures are drawn of some images, every so many epochs",
                expected="every_n_epochs, num_images and max_columns of at least 1",
                got=(every_n_epochs, num_images, max_columns),
                fix="set callbacks.pictures.every_n_epochs=10, or leave the callback out",
            )
        self.directory, self.every_n_epochs = Path(directory), every_n_epochs
        self.num_images, self.max_columns = num_images, max_columns
        self._images: list[Float[Tensor, "b c *t h w"]] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to collect."""
        self._images = []

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the first views of the first images, as the model gets them."""
        missing = self.num_images - sum(map(len, self._images))
        if missing > 0 and self._due(trainer):
            self._images.append(batch[0][:missing, 0])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw and log."""
        images, self._images = self._images, []
        if not images or not sum(map(len, images)):
            return
        task, path = pl_module, self.directory / f"epoch_{trainer.current_epoch + 1}.png"
        model = plain(task.model)
        with isolate_rng():
            clips = torch.cat(images).to(next(task.parameters()).dtype)
            columns = token_columns(model, clips, self.max_columns, self.num_images)
        if not columns:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        steps, video = len(model.pictures(clips[:1])), path.with_suffix(".gif")
        picture = pixels(strip(columns, steps, self.max_columns) if steps > 1 else draw(columns))
        part = path.with_suffix(".png.part")
        Image.fromarray(picture).save(part, format="png")
        os.replace(part, path)
        if steps > 1:
            write_gif(columns, steps, video)
        for logger in trainer.loggers:
            log_picture(logger, "val/token_maps", picture, trainer.global_step)
            if steps > 1:
                log_video(logger, "val/token_maps_video", video, trainer.global_step)

    def _due(self, trainer: Trainer) -> bool:
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0
        return due and trainer.is_global_zero and not trainer.sanity_checking


def log_picture(logger: Logger, name: str, picture: Picture, step: int) -> None:
    """Hand a picture to a logger, if it takes pictures.

    Args:
        logger: Any.
        name: What the picture shows.
        picture: (H, W, 3).
        step: Training step that it belongs to.
    """
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, picture, step, dataformats="HWC")
    elif hasattr(logger, "log_image"):  # Weights & Biases, and whatever has learnt it from there
        logger.log_image(name, [picture], step=step)


def log_video(logger: Logger, name: str, path: Path, step: int) -> None:
    """Hand a gif to a logger, if it takes gifs: W&B does. TensorBoard's wants a package of its own to make one.

    Args:
        logger: Any.
        name: What the video shows.
        path: Of the file.
        step: Training step that it belongs to.
    """
    if hasattr(logger, "log_video"):
        logger.log_video(name, [str(path)], step=step)
