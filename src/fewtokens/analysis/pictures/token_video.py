"""Pictures of the tokens of clips over time, as in the TokenLearner paper (Ryoo et al. 2021), for any method.

They show the columns of `token_maps`: the frame and, below it, a heat map of every token, or the patches that every
stage kept or merged. A strip has a column for every time step; a gif shows one time step after the other.
"""

from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
import torch
from PIL import Image

from fewtokens.analysis.evaluation import load_test_samples, unwrap_compiled
from fewtokens.analysis.pictures.sheet import Column, Key, draw, save_png
from fewtokens.analysis.pictures.token_maps import TokenPicture, token_picture
from fewtokens.errors import check
from fewtokens.files import replace_file


class TokenVideo:
    """The measure that draws the tokens of clips. It returns no numbers, and does nothing for images.

    After a call, `picture` (png) and `video` (gif) are the files that were drawn, or None.

    Args:
        num_clips: Number of test clips, one below the other.
        max_columns: Largest number of tokens, or of stages of a method that acts in many blocks, and of time steps in
            the strip, evenly spaced. The gif has all time steps.
        milliseconds: Duration of a time step in the gif.

    Raises:
        FewtokensError: A setting is out of range.
    """

    def __init__(self, num_clips: int = 2, max_columns: int = 16, milliseconds: int = 300) -> None:
        check(num_clips >= 1, "measure.token_video.num_clips", "an int >= 1", num_clips)
        check(max_columns >= 1, "measure.token_video.max_columns", "an int >= 1", max_columns)
        check(milliseconds >= 20, "measure.token_video.milliseconds", "an int >= 20", milliseconds)
        self.num_clips, self.max_columns, self.milliseconds = num_clips, max_columns, milliseconds
        self.picture: Path | None = None
        self.video: Path | None = None
        self.caption = ""

    def __call__(self, task: L.LightningModule, datamodule: L.LightningDataModule, run_dir: Path) -> dict[str, float]:
        """Write `token_maps_over_time.png` and `.gif` into `run_dir/pictures`.

        Args:
            task: The tokens of its `.model` are drawn.
            datamodule: Set up for testing. Its `class_names`, if it has them, name the classes.
            run_dir: Folder of the run; created if it does not exist.
        """
        self.picture = self.video = None
        model = unwrap_compiled(task.model)
        if len(model.sample_shape) < 4:
            return {}
        clips, targets = load_test_samples(task, datamodule, self.num_clips)
        found = token_picture(model, clips, self.max_columns, None, targets, datamodule)
        if found and found.steps > 1:
            path = run_dir / "pictures" / "token_maps_over_time.png"
            save_png(strip(found, self.max_columns), path)
            self.picture, self.video, self.caption = path, path.with_suffix(".gif"), found.caption
            write_gif(found, self.video, self.milliseconds)
        return {}


def strip(picture: TokenPicture, most: int = 16) -> Image.Image:
    """Return a sheet with time from left to right. Every clip has a row of frames and a row for every other column.

    Args:
        picture: The tokens of clips.
        most: Largest number of time steps that are shown, evenly spaced.
    """
    columns, steps = picture.columns, picture.steps
    rows = [(clip * steps, column) for clip in range(len(picture.labels)) for column in columns]
    labels = [column.title for _, column in rows]
    for clip, label in enumerate(picture.labels):
        labels[clip * len(columns)] = label or (f"clip {clip + 1}" if len(picture.labels) > 1 else labels[0])
    over_time = [
        Column(
            f"step {step + 1}",
            torch.stack([column.pictures[first + step] for first, column in rows]),
            [column.notes[first + step] for first, column in rows],
        )
        for step in np.linspace(0, steps - 1, min(most, steps)).round().astype(int).tolist()
    ]
    words = "The first row of a clip shows its frames over time. " + picture.content.replace("A column", "Another row")
    return draw(over_time, labels, [Key(words), *picture.marks])


def write_gif(picture: TokenPicture, path: Path, milliseconds: int = 300) -> None:
    """Write an endless gif with a frame for every time step. A frame shows the columns, with a row for every clip.

    Args:
        picture: The tokens of clips.
        path: Path of the file. It is written completely or not at all.
        milliseconds: Duration of a time step.
    """
    columns, steps = picture.columns, picture.steps
    frames = []
    for step in range(steps):
        now = [replace(each, pictures=each.pictures[step::steps], notes=each.notes[step::steps]) for each in columns]
        # The number of the step also keeps equal frames apart, which Pillow would merge.
        now[0] = replace(now[0], title=f"{columns[0].title}\n{step + 1} of {steps}")
        frame = draw(now, picture.labels, [Key(picture.content), *picture.marks])
        # A gif has 256 colors, and heat maps take most of them. Quantizing to a given palette, here the frame's own,
        # dithers, which is closer to the frame.
        frames.append(frame.quantize(palette=frame.quantize(256, kmeans=1)))
    with replace_file(path, "wb") as file:
        frames[0].save(file, format="gif", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
