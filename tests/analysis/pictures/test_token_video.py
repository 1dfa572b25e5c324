"""Pictures over time show at every step what the origin of the tokens says of that step."""

from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image

from fewtokens.analysis.pictures import token_video as module
from fewtokens.analysis.pictures.drawing import CELL
from fewtokens.analysis.pictures.sheet import GAP, MARGIN, SIDE, draw, line_height, text_width
from fewtokens.analysis.pictures.token_maps import token_picture
from fewtokens.analysis.pictures.token_video import TokenVideo, strip, write_gif
from fewtokens.backbones.vivit import Model
from fewtokens.errors import FewtokensError
from fewtokens.tokenizers.base import Tokenizer
from fewtokens.tokenizers.token_learner import TokenLearnerV11
from fewtokens.tokenizers.tome import ToMe
from fewtokens.tokenizers.top_k import TopK
from vivits import Data, Task, build, clips

STEPS, GRID = 3, (4, 6)  # of `build`
ROW, COLUMN = 85 + GAP, CELL + GAP  # pixels from one picture to the next
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


def patches(picture: np.ndarray, row: int, column: int, top: int = 2, left: int = MARGIN) -> np.ndarray:
    """Mean brightness of every patch (4, 6) in one picture of a sheet, below `top` lines of titles."""
    y, x = MARGIN + top * line_height(13) + row * ROW, left + column * COLUMN
    cell = picture[y : y + ROW - GAP, x : x + CELL].mean(axis=2)
    down, across = (np.array_split(np.arange(size), parts) for size, parts in zip(cell.shape, GRID, strict=True))
    return np.array([[cell[np.ix_(y, x)].mean() for x in across] for y in down])


def left_of(labels: list[str]) -> int:
    return MARGIN + round(max(text_width(label, 13) for label in labels)) + SIDE


def frames_of(path: Path) -> list[np.ndarray]:
    with Image.open(path) as file:
        found = []
        for index in range(file.n_frames):
            file.seek(index)
            found.append(np.asarray(file.convert("RGB")))
        return found


def drawn(tokenizer: Any, tmp_path: Path, count: int = 2, still: bool = True) -> tuple[np.ndarray, list[np.ndarray]]:
    images = torch.zeros(count, 3, 6, 8, 12) if still else clips(count)
    found = token_picture(build(tokenizer=tokenizer, at=[1]), images)
    assert found is not None
    write_gif(found, tmp_path / "maps.gif")
    return np.asarray(strip(found)), frames_of(tmp_path / "maps.gif")


def test_a_token_lights_up_where_and_when_its_origin_says(tmp_path: Path) -> None:
    picture, frames = drawn(Walk, tmp_path)
    assert len(frames) == STEPS
    left = left_of(["block 1\ntoken 1"])
    for step in range(STEPS):
        for clip in range(2):
            for token, place in enumerate((7 * step, 23 - 7 * step)):
                assert patches(frames[step], clip, token + 1).argmax() == place
                assert patches(picture, 3 * clip + token + 1, step, 1, left).argmax() == place


def test_a_token_of_the_whole_clip_is_as_bright_as_its_share_of_the_clip(tmp_path: Path) -> None:
    frames = drawn(Once, tmp_path)[1]
    before, now, after = (patches(frame, 0, 1) for frame in frames)
    assert (now.argmax(), after.argmax()) == (9, 14)
    assert now.max() > 2 * after.max() > 2 * before.max()


def test_what_is_dropped_is_faded_step_by_step(tmp_path: Path) -> None:
    _, frames = drawn(Halves, tmp_path)
    covered = [patches(frame, 0, 1) > 50 for frame in frames]  # the frames are black, dropped patches are light
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
        assert 5 * COLUMN < video.width < 6 * COLUMN, "label and prediction, the frame and four tokens"
    width, height = Image.open(measure.picture).size
    assert 5 * ROW < height < 6 * ROW + 60, "the frame and four tokens, and the legend"
    assert width == 560, "the width of the legend"


@pytest.mark.parametrize("method", [partial(TopK, keep_rate=0.5), partial(ToMe, r=6)])
def test_stages_of_methods_that_drop_or_merge(method: Any, tmp_path: Path) -> None:
    picture, frames = drawn(method, tmp_path, still=False)
    assert len(frames) == STEPS
    numbered = ROW + line_height(13) + 2  # the numbers of tokens may differ between steps
    assert 4 * ROW < picture.shape[0] < 4 * numbered + 150, "two clips: the frame and a stage each, and the legend"


def sheets(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Record the arguments of every sheet that is drawn."""
    found: list[tuple] = []

    def spy(*arguments: Any) -> Image.Image:
        found.append(arguments)
        return draw(*arguments)

    monkeypatch.setattr(module, "draw", spy)
    return found


def test_a_long_clip_has_all_its_steps_in_the_gif_and_some_in_the_strip(tmp_path: Path, monkeypatch) -> None:
    found, drawn_sheets = token_picture(build(tokenizer=learner, at=[1]), clips(1)), sheets(monkeypatch)
    assert found is not None
    strip(found, most=2)
    assert [column.title for column in drawn_sheets[0][0]] == ["step 1", "step 3"]
    write_gif(found, tmp_path / "maps.gif")
    assert len(frames_of(tmp_path / "maps.gif")) == STEPS


def test_label_and_prediction_stand_beside_the_frames_and_the_legend_below(tmp_path: Path, monkeypatch) -> None:
    net, targets = build(tokenizer=learner, at=[1]), torch.tensor([3, 0])
    found, drawn_sheets = token_picture(net, clips(), targets=targets), sheets(monkeypatch)
    assert found is not None
    predicted = net(clips()).argmax(dim=1).tolist()
    expected = [f"label: {a}\nprediction: {b}{'' if a == b else ' ✗'}" for a, b in zip([3, 0], predicted, strict=True)]
    assert found.row_labels[::STEPS] == [f"{label}\nstep 1" for label in expected]
    assert found.row_labels[1::STEPS] == ["step 2", "step 2"]
    strip(found)
    write_gif(found, tmp_path / "maps.gif")
    (_, over_time, below), *frames = drawn_sheets
    assert over_time == [
        label for clip in expected for label in (clip, "block 1\ntoken 1", "token 2", "token 3", "token 4")
    ]
    assert "Another row is one token" in below[0].text
    assert [labels for _, labels, _ in frames] == [expected] * STEPS
    assert [columns[0].title for columns, *_ in frames] == [f"frame\n{step} of 3" for step in (1, 2, 3)]


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
