"""Pictures over time show at every step what the origin of the tokens says of that step."""

from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image

from fewtokens.analysis.pictures.drawing import pixels
from fewtokens.analysis.pictures.token_maps import token_columns
from fewtokens.analysis.pictures.token_video import TokenVideo, strip, write_gif
from fewtokens.backbones.vivit import Model
from fewtokens.errors import FewtokensError
from fewtokens.tokenizers.base import Tokenizer
from fewtokens.tokenizers.token_learner import TokenLearnerV11
from fewtokens.tokenizers.tome import ToMe
from fewtokens.tokenizers.top_k import TopK
from vivits import Data, Task, build, clips

STEPS, GRID, CELL, HEAD = 3, (4, 6), 120, 43  # of `build`; pixels of a cell and above the first
learner = partial(TokenLearnerV11, num_tokens=4)


class Walk(Tokenizer):
    """Two tokens a step: the first looks at patch 7 * step, the second at 23 - 7 * step, both a bit everywhere."""

    keeps_frames = True

    def forward(self, tokens, block):
        weights = torch.full((len(tokens.per_frame), 2, 24), 0.01)
        for row in range(len(weights)):
            step = row % STEPS
            weights[row, 0, 7 * step] = weights[row, 1, 23 - 7 * step] = 1.0
        return block(tokens.resample_per_frame(weights @ tokens.per_frame, weights))


class Once(Tokenizer):
    """Two tokens for the whole clip: the first looks at patch 9 of step 1, and nine times less at 14 of step 2."""

    def forward(self, tokens, block):
        weights = torch.full((len(tokens.x), 2, 72), 0.01)
        weights[:, 0, 24 + 9], weights[:, 0, 48 + 14] = 0.9, 0.1
        weights = weights / weights.sum(dim=2, keepdim=True)
        few = tokens.resample(weights @ tokens.patches, weights)
        return block(few.select(torch.tensor([[0, 1]]).expand(len(tokens.x), -1)))


class Halves(Tokenizer):
    """Keeps the left half of step 0, the right half of step 1 and nothing but patch 0 of step 2."""

    def forward(self, tokens, block):
        tokens, _ = block.attend(tokens)
        column = torch.arange(24) % 6
        kept = torch.cat([column < 3, column >= 3, torch.arange(24) == 0]).nonzero()[:, 0]
        return block.feed_forward(tokens.select(kept.expand(len(tokens.x), -1)))


def patches(picture: np.ndarray, row: int, column: int, rows: int, side: int = 0) -> np.ndarray:
    """Mean brightness of every patch (4, 6) in one cell of a picture."""
    height = (picture.shape[0] - HEAD) / rows
    top, left = HEAD + row * height, side + column * CELL
    cell = picture[round(top) + 4 : round(top + height) - 4, round(left) + 4 : round(left) + CELL - 4].mean(axis=2)
    down, across = (np.array_split(np.arange(size), parts) for size, parts in zip(cell.shape, GRID, strict=True))
    return np.array([[cell[np.ix_(y, x)].mean() for x in across] for y in down])


def frames_of(path: Path) -> list[np.ndarray]:
    with Image.open(path) as file:
        found = []
        for index in range(file.n_frames):
            file.seek(index)
            found.append(np.asarray(file.convert("RGB")))
        return found


def drawn(tokenizer: Any, tmp_path: Path, count: int = 2, still: bool = True) -> tuple[np.ndarray, list[np.ndarray]]:
    images = torch.zeros(count, 3, 6, 8, 12) if still else clips(count)
    columns = token_columns(build(tokenizer=tokenizer, at=[1]), images)
    write_gif(columns, STEPS, tmp_path / "maps.gif")
    return pixels(strip(columns, STEPS)), frames_of(tmp_path / "maps.gif")


def test_a_token_lights_up_where_and_when_its_origin_says(tmp_path: Path) -> None:
    picture, frames = drawn(Walk, tmp_path)
    assert len(frames) == STEPS
    side = picture.shape[1] - STEPS * CELL
    for step in range(STEPS):
        for clip in range(2):
            for token, place in enumerate((7 * step, 23 - 7 * step)):
                assert patches(frames[step], clip, token + 1, rows=2).argmax() == place
                assert patches(picture, 3 * clip + token + 1, step, rows=6, side=side).argmax() == place


def test_a_token_of_the_whole_clip_is_as_bright_as_its_share_of_the_clip(tmp_path: Path) -> None:
    frames = drawn(Once, tmp_path)[1]
    before, now, after = (patches(frame, 0, 1, rows=2) for frame in frames)
    assert (now.argmax(), after.argmax()) == (9, 14)
    assert now.max() > 2 * after.max() > 2 * before.max()


def test_what_is_dropped_is_covered_step_by_step(tmp_path: Path) -> None:
    _, frames = drawn(Halves, tmp_path)
    covered = [patches(frame, 0, 1, rows=2) > 50 for frame in frames]  # the frames are black, covers are grey
    column = np.arange(24).reshape(GRID) % 6
    assert np.array_equal(covered[0], column >= 3)
    assert np.array_equal(covered[1], column < 3)
    assert np.array_equal(covered[2], np.arange(24).reshape(GRID) > 0)


@pytest.mark.parametrize("model", get_args(Model)[:3])
def test_measure(model: Model, tmp_path: Path) -> None:
    measure = TokenVideo(num_clips=1, milliseconds=200)
    assert measure(Task(build(model, learner, at=[1])), Data(), tmp_path) == {}
    assert measure.picture == tmp_path / "pictures" / "token_maps_over_time.png"
    assert measure.video == tmp_path / "pictures" / "token_maps_over_time.gif"
    assert {path.name for path in measure.picture.parent.iterdir()} == {measure.picture.name, measure.video.name}
    with Image.open(measure.video) as video:
        assert (video.n_frames, video.info["duration"], video.info["loop"]) == (STEPS, 200, 0)
        assert video.width == 5 * CELL, "the frame and four tokens"
    width, height = Image.open(measure.picture).size
    assert height == pytest.approx(HEAD + 5 * CELL * 8 / 12, abs=2)
    assert STEPS * CELL < width < (STEPS + 1) * CELL


@pytest.mark.parametrize("method", [partial(TopK, keep_rate=0.5), partial(ToMe, r=6)])
def test_stages_of_methods_that_drop_or_merge(method: Any, tmp_path: Path) -> None:
    picture, frames = drawn(method, tmp_path, still=False)
    assert len(frames) == STEPS
    assert picture.shape[0] == pytest.approx(HEAD + 4 * CELL * 8 / 12, abs=2), "two clips: the frame and a stage each"


def test_a_long_clip_has_all_its_steps_in_the_gif_and_some_in_the_strip(tmp_path: Path) -> None:
    columns = token_columns(build(tokenizer=learner, at=[1]), clips(1))
    assert pixels(strip(columns, STEPS, most=2)).shape[1] == pixels(strip(columns, STEPS)).shape[1] - CELL
    write_gif(columns, STEPS, tmp_path / "maps.gif")
    assert len(frames_of(tmp_path / "maps.gif")) == STEPS


def test_label_and_prediction_stand_on_the_first_frame_of_the_strip_and_on_every_frame_of_the_gif() -> None:
    net, targets = build(tokenizer=learner, at=[1]), torch.tensor([3, 0])
    columns = token_columns(net, clips(), targets=targets)
    predicted = net(clips()).argmax(dim=1).tolist()
    notes = [f"true: {a}\npred: {b}" for a, b in zip([3, 0], predicted, strict=True)]
    assert columns[0].notes == [note for note in notes for _ in range(STEPS)]
    shown = [text.get_text() for axis in strip(columns, STEPS).axes for text in axis.texts]
    assert sum(text.startswith("true:") for text in shown) == 2, "once for each clip"


def test_images_and_dense_models_have_none(make, measured, tmp_path: Path) -> None:
    measure = TokenVideo()
    assert measure(*measured(make(learner, at=[1])), tmp_path) == {}
    assert measure(Task(build()), Data(), tmp_path) == {}
    assert (measure.picture, measure.video) == (None, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [{"num_clips": 0}, {"max_columns": 0}, {"milliseconds": 0}])
def test_wrong_numbers_are_answered_with_a_sentence(wrong: dict[str, int]) -> None:
    with pytest.raises(FewtokensError, match=rf"`measure\.token_video\.{next(iter(wrong))}` must be"):
        TokenVideo(**wrong)
