"""Pictures of the tokens of clips over time, as in the TokenLearner paper (Ryoo et al. 2021), for any method.

They show the columns of `token_maps`: the frame and, below it, a heat map of every token, or the patches that every
stage kept or merged. A strip has a column for every time step; a gif shows one time step after the other.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from fewtokens.analysis.evaluation import load_test_samples, unwrap_compiled
from fewtokens.analysis.pictures.drawing import Column, draw, pixels, write_png
from fewtokens.analysis.pictures.token_maps import token_columns
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
        steps = len(model.pictures(clips[:1]))
        columns = token_columns(model, clips, self.max_columns, None, targets, datamodule) if steps > 1 else []
        if columns:
            path = run_dir / "pictures" / "token_maps_over_time.png"
            write_png(strip(columns, steps, self.max_columns), path)
            self.picture, self.video = path, path.with_suffix(".gif")
            write_gif(columns, steps, self.video, self.milliseconds)
        return {}


def strip(columns: Sequence[Column], steps: int, most: int = 16) -> Figure:
    """Return a figure with time from left to right. Every clip has a row of frames and a row for every other column.

    Args:
        columns: The columns of `token_columns`, with a picture for every time step of every clip.
        steps: Number of time steps of a clip.
        most: Largest number of time steps that are shown, evenly spaced.
    """
    clips = len(columns[0].pictures) // steps
    rows = [(clip * steps, column) for clip in range(clips) for column in columns]
    labels = [column.title for _, column in rows]
    if clips > 1:
        for clip in range(clips):
            labels[clip * len(columns)] = f"clip {clip + 1}\n{columns[0].title}"
    shown = np.linspace(0, steps - 1, min(most, steps)).round().astype(int).tolist()

    def note(column: Column, clip: int, step: int) -> str:  # label and prediction once per clip, on its first frame
        return "" if column is columns[0] and step != shown[0] else column.notes[clip + step]

    over_time = [
        Column(
            f"step {step + 1}",
            torch.stack([column.pictures[first + step] for first, column in rows]),
            [note(column, first, step) for first, column in rows],
        )
        for step in shown
    ]
    return draw(over_time, labels)


def write_gif(columns: Sequence[Column], steps: int, path: Path, milliseconds: int = 300) -> None:
    """Write an endless gif with a frame for every time step. A frame shows the columns, with a row for every clip.

    Args:
        columns: The columns of `token_columns`.
        steps: Number of time steps of a clip.
        path: Path of the file. It is written completely or not at all.
        milliseconds: Duration of a time step.
    """
    frames = []
    for step in range(steps):
        now = [replace(each, pictures=each.pictures[step::steps], notes=each.notes[step::steps]) for each in columns]
        # The number of the step also keeps equal frames apart, which Pillow would merge.
        now[0] = replace(now[0], title=f"{columns[0].title}\nstep {step + 1} of {steps}")
        frame = Image.fromarray(pixels(draw(now)))
        # A gif has 256 colors, and heat maps take most of them. Quantizing to a given palette, here the frame's own,
        # dithers, which is closer to the frame.
        frames.append(frame.quantize(palette=frame.quantize(256, kmeans=1)))
    with replace_file(path, "wb") as file:
        frames[0].save(file, format="gif", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
