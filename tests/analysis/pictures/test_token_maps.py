import sys
from functools import partial

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from fewtokens.analysis.pictures.drawing import CELL, displayed, heat, merged, without_dropped
from fewtokens.analysis.pictures.sheet import GAP, MARGIN, line_height, text_width
from fewtokens.analysis.pictures.token_maps import TokenMaps, TokenPicture, kind_of, mosaic, token_picture
from fewtokens.tokenizers.token_fuser import TokenFuser
from fewtokens.tokenizers.token_learner import TokenLearnerV11

learner = partial(TokenLearnerV11, num_tokens=4)


def test_kinds_of_origin():
    eye = torch.eye(6)[None]
    assert kind_of(eye[:, 2:], 16) == "selection"
    assert kind_of(eye[:, 2:] * torch.tensor([1.0, 0, 1, 1])[None, :, None], 16) == "selection"  # padding
    merged = torch.tensor([[[0.5, 0.5, 0, 0], [0, 0, 1.0, 0]]])
    assert kind_of(merged, 16) == "groups"
    assert kind_of(torch.rand(2, 3, 6) + 0.1, 16) == "maps"
    assert kind_of(torch.rand(2, 3, 6) + 0.1, 2) == "shares"


@pytest.mark.parametrize(("channels", "pool", "count"), [(1, "token", 3), (3, "avg", 1), (4, "token", 1)])
def test_one_picture_for_any_image(make, measured, tmp_path, channels, pool, count):
    model = make(learner, at=[1], channels=channels, pool=pool).train()
    measure = TokenMaps(num_images=count)
    assert measure(*measured(model, channels=channels), tmp_path) == {}
    assert measure.picture == tmp_path / "pictures" / "token_maps.png"
    height, width = imread(measure.picture).shape[:2]
    size = 13  # of the text in a sheet of this width
    # the label and prediction, the image and four tokens
    assert 5 * (CELL + GAP) < width == round(text_width("prediction: 0 ✗", size)) + 5 * (CELL + GAP) + 28
    rows = height - 3 * MARGIN - 2 * line_height(size) - count * (85 + GAP) + GAP
    assert 2 * line_height(size) <= rows <= 4 * line_height(size), "what is left is the legend"
    assert all(module.training for module in model.modules())
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def titles(found) -> list[str]:
    return [column.title for column in found.columns]


def words(found) -> str:
    return " ".join(key.text for key in found.legend)


@pytest.mark.parametrize(
    ("kind", "at", "expected", "mark"),
    [
        ("selection", [1, 2], ["image", "block 1\n16 tokens", "block 2\n11 tokens"], "dropped patches"),
        (
            "merging",
            [0, 1, 2],
            ["image", "block 0\n23 tokens", "block 1\n22 tokens", "block 2\n21 tokens"],
            "merged into one token",
        ),
    ],
)
def test_a_column_per_stage(make, methods, kind, at, expected, mark):
    found = token_picture(make(methods[kind], at=at), torch.randn(2, 3, 8, 12))
    assert titles(found) == expected
    assert "A column is a stage" in words(found)
    assert [key for key in found.legend if mark in key.text and key.swatch is not None]
    assert len(found.marks) == 1


def test_a_column_per_token_of_the_first_stage(make):
    expected = ["image", "block 1\ntoken 1", "token 2", "token 3", "token 4"]
    found = token_picture(make(learner, at=[1]), torch.randn(2, 3, 8, 12))
    assert titles(found) == expected
    assert "A column is one token" in words(found)
    assert "share of each patch" in words(found)
    fused = token_picture(make(partial(TokenFuser, inner=learner), at=[1, 2]), torch.randn(2, 3, 8, 12))
    assert titles(fused) == expected


def test_no_more_columns_than_asked(make, methods):
    images = torch.randn(1, 3, 8, 12)
    stages = token_picture(make(methods["merging"], at=[0, 1, 2]), images, most=2)
    assert [title.split("\n")[0] for title in titles(stages)] == ["image", "block 0", "block 2"]
    many = token_picture(make(learner, at=[1]), images, most=3)
    assert titles(many) == ["image", "block 1\n4 tokens"]
    assert "largest share in the same token" in words(many)


def test_adaptive_numbers_are_noted_per_image(make, methods, measured, tmp_path):
    model = make(methods["adaptive"], at=[1])
    _, stage = token_picture(model, torch.randn(4, 3, 8, 12)).columns
    low, high = min(map(int, stage.notes)), max(map(int, stage.notes))
    assert stage.title == f"block 1\n{low}-{high} tokens"
    assert low < high
    measure = TokenMaps()
    measure(*measured(model), tmp_path)
    assert measure.picture is not None


def test_every_row_has_its_label_and_prediction(make, measured):
    model, images, targets = make(learner, at=[1]), torch.randn(3, 3, 8, 12), torch.tensor([0, 4, 1])
    predicted = model(images).argmax(dim=1).tolist()
    found = token_picture(model, images, targets=targets)
    assert found.row_labels == [
        f"label: {a}\nprediction: {b}{'' if a == b else ' ✗'}" for a, b in zip(targets.tolist(), predicted, strict=True)
    ]
    assert "label and the prediction" in words(found)
    data = measured(model)[1]
    data.class_names = ["a class with a very long name that goes on", *["b" * 40] * 4]
    long = token_picture(model, images, rows=2, targets=targets, datamodule=data).row_labels
    assert len(long) == 2
    assert long[0].startswith("label: a class\nwith a very long…\n")
    assert max(len(line) for label in long for line in label.split("\n")) <= 18
    several = token_picture(model, images, targets=torch.ones(3, 5).long())
    assert set(several.row_labels) == {""}, "several labels"
    assert "prediction" not in words(several)


def test_a_dense_model_has_no_picture(make, measured, tmp_path):
    measure = TokenMaps()
    measure(*measured(make(learner, at=[1])), tmp_path / "few")
    assert measure.picture is not None
    assert measure(*measured(make()), tmp_path / "dense") == {}
    assert measure.picture is None
    assert not (tmp_path / "dense").exists()


def test_maps_are_bright_where_the_token_looks():
    pictures = displayed(torch.zeros(1, 1, 4, 8))
    shares = torch.zeros(1, 8)
    shares[0, 6] = 1.0  # row 1, column 2 of 2 x 4
    bright = heat(pictures, shares, (2, 4))[0].sum(dim=0)
    row, column = np.unravel_index(bright.argmax().item(), bright.shape)
    assert (row * 2 // bright.shape[0], column * 4 // bright.shape[1]) == (1, 2)
    flat = heat(pictures, torch.full((1, 8), 0.5) + 1e-6 * torch.rand(1, 8), (2, 4))
    assert flat.max() - flat.min() < 0.75 * (bright.max() - bright.min())


def test_dropped_patches_are_faded_and_groups_have_their_mean_color():
    pictures = displayed(torch.rand(1, 3, 4, 4))
    side = pictures.shape[2] // 2
    kept = torch.tensor([[True, False, True, True]])
    same = (without_dropped(pictures, kept, (2, 2)) == pictures).all(dim=1)[0]
    assert same[:side, :side].all()
    assert not same[:side, side:].any()
    assert same[side:].all()
    filled = merged(pictures, torch.tensor([[0, 1, 2, 2]]), (2, 2))[0]
    assert torch.equal(filled[:, :side], pictures[0, :, :side]), "patches of their own stay as they are"
    inside = filled[:, side + 1 : -1, 1:-1]
    mean = pictures[0, :, side:].mean(dim=(1, 2))
    assert torch.allclose(inside, mean[:, None, None].expand_as(inside), atol=1e-3)
    line = filled[:, side]
    assert (line == line[:, :1]).all(), "the line around the group has one color"
    assert not torch.allclose(line[:, 0], mean, atol=0.05)


def test_a_group_in_several_pieces_has_one_color():
    pictures = displayed(torch.rand(1, 1, 4, 4))
    filled = merged(pictures, torch.tensor([[0, 1, 2, 0]]), (2, 2))[0]
    side = pictures.shape[2] // 2
    assert torch.equal(filled[:, 4, 4], filled[:, side + 4, side + 4])
    assert torch.equal(filled[:, 0, 0], filled[:, -1, -1])


def test_display_stretches_every_image_alone():
    images = torch.stack([torch.linspace(-3, 1, 12).view(1, 3, 4), torch.full((1, 3, 4), 9.0)])
    pictures = displayed(images)
    assert pictures.shape == (2, 3, 96, CELL)
    assert (pictures[0].min(), pictures[0].max()) == (0, 1)
    assert pictures[1].abs().max() == 0


def test_pictures_of_any_size_get_one_width():
    for height, width in ((8, 8), (300, 200), (128, 128)):
        assert displayed(torch.rand(1, 1, height, width)).shape == (1, 3, round(CELL * height / width), CELL)
    plain = torch.full((1, 3, 4, 4), 0.25)
    assert torch.equal(displayed(plain, width=8, stretch=False), torch.full((1, 3, 8, 8), 0.25))


def test_the_caption_names_label_and_prediction():
    labels = ["label: a\nprediction: b ✗", "label: a long\nname\nprediction: c", ""]
    caption = TokenPicture([], labels, 1, [], "").caption
    assert caption == "label: a, prediction: b ✗ | label: a long name, prediction: c"


def test_a_mosaic_has_a_heat_map_for_every_token() -> None:
    origin = torch.eye(4)[None, :3]  # three tokens, each of one patch
    drawn = mosaic(torch.full((1, 3, 41, 41), 0.5), origin, (2, 2))[0]
    assert (drawn[:, 21:, 21:] == 1).all(), "there is no fourth token"
    colored = drawn[0] - drawn[2]  # the heat map is orange where a token looks
    for number, (y, x) in enumerate(((0, 0), (0, 21), (21, 0))):
        quarters = colored[y : y + 20, x : x + 20].unflatten(0, (2, 10)).unflatten(2, (2, 10)).mean(dim=(1, 3))
        assert quarters.flatten().argmax() == number
