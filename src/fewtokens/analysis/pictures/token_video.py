"""Where tokens look as a clip goes on: the picture of the TokenLearner paper (Ryoo et al. 2021), for any method.

Drawn from `Tokens.origin` as `token_maps` does it: the frame, and below it every token's heat map, or the patches that
every stage kept or merged. A strip has a column for every time step; a gif shows one step after the other.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from fewtokens.analysis.cost import plain, test_images
from fewtokens.analysis.pictures.drawing import Column, draw, pixels
from fewtokens.analysis.pictures.token_maps import token_columns
from fewtokens.errors import FewtokensError


class TokenVideo:
    """The measure that draws clips; images it leaves alone. It has no numbers.

    `picture` (png) and `video` (gif) are the files of the last call, None if there was nothing to draw.

    Args:
        num_clips: The first test clips, one below the other.
        max_columns: At most so many tokens, or stages of a method that acts in many blocks, and so many time steps of
            the strip, evenly spread; the gif has all time steps.
        milliseconds: What the gif shows a time step for.
    """

    def __init__(self, num_clips: int = 2, max_columns: int = 16, milliseconds: int = 300) -> None:
        if min(num_clips, max_columns) < 1 or milliseconds < 20:
            raise FewtokensError(
                "A picture of clips has some, and a gif shows each time step for a while",
                expected="num_clips and max_columns of at least 1, milliseconds of at least 20",
                got=(num_clips, max_columns, milliseconds),
                fix="set measure.token_video.num_clips=2, or leave it out with ~measure.token_video",
            )
        self.num_clips, self.max_columns, self.milliseconds = num_clips, max_columns, milliseconds
        self.picture: Path | None = None
        self.video: Path | None = None

    def __call__(self, task: L.LightningModule, datamodule: L.LightningDataModule, run_dir: Path) -> dict[str, float]:
        """Writes `token_maps_over_time.png` and `.gif` into `run_dir/pictures`.

        Args:
            task: Its `.model` is looked at.
            datamodule: Set up for testing.
            run_dir: Made if there is none.
        """
        self.picture = self.video = None
        model = plain(task.model)
        if len(model.sample_shape) < 4:
            return {}
        clips = test_images(task, datamodule, self.num_clips)
        steps = len(model.pictures(clips[:1]))
        columns = token_columns(model, clips, self.max_columns) if steps > 1 else []
        if columns:
            path = run_dir / "pictures" / "token_maps_over_time.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            FigureCanvasAgg(strip(columns, steps, self.max_columns)).print_png(path)
            self.picture, self.video = path, path.with_suffix(".gif")
            write_gif(columns, steps, self.video, self.milliseconds)
        return {}


def strip(columns: Sequence[Column], steps: int, most: int = 16) -> Figure:
    """Time from left to right: a row for each of the columns, the frames first, and so for every clip.

    Args:
        columns: As `token_columns` gives them, with a picture for every time step of every clip.
        steps: Time steps of a clip.
        most: Time steps that are shown, evenly spread.
    """
    clips = len(columns[0].pictures) // steps
    rows = [(clip * steps, column) for clip in range(clips) for column in columns]
    labels = [column.title for _, column in rows]
    if clips > 1:
        for clip in range(clips):
            labels[clip * len(columns)] = f"clip {clip + 1}\n{columns[0].title}"
    shown = np.linspace(0, steps - 1, min(most, steps)).round().astype(int).tolist()
    over_time = [
        Column(
            f"step {step + 1}",
            torch.stack([column.pictures[first + step] for first, column in rows]),
            [column.notes[first + step] for first, column in rows],
        )
        for step in shown
    ]
    return draw(over_time, labels)


def write_gif(columns: Sequence[Column], steps: int, path: Path, milliseconds: int = 300) -> None:
    """An endless gif with a frame for every time step: each frame the columns, a row for every clip.

    Args:
        columns: As `token_columns` gives them.
        steps: Time steps of a clip.
        path: Of the file, which is there whole or not at all.
        milliseconds: For each time step.
    """
    frames = []
    for step in range(steps):
        now = [replace(each, pictures=each.pictures[step::steps], notes=each.notes[step::steps]) for each in columns]
        # The number also keeps steps apart that look the same: equal frames would become a single one.
        now[0] = replace(now[0], title=f"{columns[0].title}\nstep {step + 1} of {steps}")
        frame = Image.fromarray(pixels(draw(now)))
        # Heat maps take most of the 256 colours that a gif has; dots of those are nearer to the frame's than none.
        frames.append(frame.quantize(palette=frame.quantize(256, kmeans=1)))
    part = path.with_suffix(".gif.part")
    frames[0].save(part, format="gif", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    part.replace(path)
