"""Pictures of where the tokens look, as training goes on."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.seed import isolate_rng
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from torch import Tensor

from fewtokens.analysis.cost import plain
from fewtokens.analysis.token_maps import draw, token_columns
from fewtokens.errors import FewtokensError

Picture = UInt8[np.ndarray, "height width 3"]


class Pictures(Callback):
    """Draws the first validation images at the end of every n-th epoch's validation, on rank 0.

    The picture goes to `epoch_<number>.png` in a directory, and to every logger that takes images (Weights & Biases,
    TensorBoard). It is that of `fewtokens.analysis.token_maps`; where no tokenizer reduces anything there is none. The
    images are those that validation has loaded anyway, and no random numbers are used up: training and its resuming go
    on as without. Next to a callback that validates an average of the weights it stands first, and draws the average.

    Args:
        directory: Of the png files.
        every_n_epochs: Epochs from one picture to the next.
        num_images: Rows; fewer if this process has fewer validation images.
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
        self._images: list[Float[Tensor, "b c h w"]] = []

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
        with isolate_rng():
            picture = self._drawn(pl_module, torch.cat(images))
        if picture is None:
            return
        epoch = trainer.current_epoch + 1
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"epoch_{epoch}.png"
        part = path.with_suffix(".png.part")
        Image.fromarray(picture).save(part, format="png")
        os.replace(part, path)
        for logger in trainer.loggers:
            log_picture(logger, "val/token_maps", picture, trainer.global_step)

    def _due(self, trainer: Trainer) -> bool:
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0
        return due and trainer.is_global_zero and not trainer.sanity_checking

    def _drawn(self, task: LightningModule, images: Float[Tensor, "b c h w"]) -> Picture | None:
        columns = token_columns(plain(task.model), images.to(next(task.parameters()).dtype), self.max_columns)
        if not columns:
            return None
        canvas = FigureCanvasAgg(draw(columns))
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


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
