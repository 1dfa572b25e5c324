import sys
from functools import partial

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from fewtokens.analysis.pictures.drawing import colored, covered, displayed, heat
from fewtokens.analysis.pictures.token_maps import TokenMaps, kind_of, token_columns
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
    assert kind_of(torch.rand(2, 3, 6) + 0.1, 2) == "groups"


@pytest.mark.parametrize(("channels", "pool", "count"), [(1, "token", 3), (3, "avg", 1), (4, "token", 1)])
def test_one_picture_for_any_image(make, measured, tmp_path, channels, pool, count):
    model = make(learner, at=[1], channels=channels, pool=pool).train()
    measure = TokenMaps(num_images=count)
    assert measure(*measured(model, channels=channels), tmp_path) == {}
    assert measure.picture == tmp_path / "pictures" / "token_maps.png"
    height, width = imread(measure.picture).shape[:2]
    assert width == 5 * 120  # the image and four tokens
    assert height == pytest.approx(120 * (count * 8 / 12 + 0.36), abs=2)
    assert all(module.training for module in model.modules())
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


@pytest.mark.parametrize(
    ("kind", "at", "titles"),
    [
        ("selection", [1, 2], ["image", "block 1\n16 tokens", "block 2\n11 tokens"]),
        ("merging", [0, 1, 2], ["image", "block 0\n23 tokens", "block 1\n22 tokens", "block 2\n21 tokens"]),
    ],
)
def test_a_column_per_stage(make, methods, kind, at, titles):
    columns = token_columns(make(methods[kind], at=at), torch.randn(2, 3, 8, 12))
    assert [column.title for column in columns] == titles


def test_a_column_per_token_of_the_first_stage(make):
    columns = token_columns(make(learner, at=[1]), torch.randn(2, 3, 8, 12))
    titles = ["image", "block 1\ntoken 1", "token 2", "token 3", "token 4"]
    assert [column.title for column in columns] == titles
    fused = token_columns(make(partial(TokenFuser, inner=learner), at=[1, 2]), torch.randn(2, 3, 8, 12))
    assert [column.title for column in fused] == titles


def test_no_more_columns_than_asked(make, methods):
    images = torch.randn(1, 3, 8, 12)
    stages = token_columns(make(methods["merging"], at=[0, 1, 2]), images, most=2)
    assert [column.title.split("\n")[0] for column in stages] == ["image", "block 0", "block 2"]
    many = token_columns(make(learner, at=[1]), images, most=3)
    assert [column.title for column in many] == ["image", "block 1\n4 tokens"]


def test_adaptive_numbers_are_noted_per_image(make, methods, measured, tmp_path):
    model = make(methods["adaptive"], at=[1])
    _, stage = token_columns(model, torch.randn(4, 3, 8, 12))
    assert " to " in stage.title
    assert len(set(stage.notes)) > 1
    measure = TokenMaps()
    measure(*measured(model), tmp_path)
    assert measure.picture is not None


def test_the_first_column_shows_label_and_prediction(make, measured):
    model, images, targets = make(learner, at=[1]), torch.randn(3, 3, 8, 12), torch.tensor([0, 4, 1])
    predicted = model(images).argmax(dim=1).tolist()
    first, *others = token_columns(model, images, targets=targets)
    assert first.notes == [f"true: {a}\npred: {b}" for a, b in zip(targets.tolist(), predicted, strict=True)]
    assert {note for column in others for note in column.notes} == {""}
    data = measured(model)[1]
    data.class_names = ["cat", "dog", "ship", "a class with a long name", "frog"]
    first, *_ = token_columns(model, images, rows=2, targets=targets, datamodule=data)
    shown = ["cat", "dog", "ship", "a class with a…", "frog"]
    assert first.notes == [f"true: {shown[a]}\npred: {shown[b]}" for a, b in zip([0, 4], predicted[:2], strict=True)]
    assert set(token_columns(model, images, targets=torch.ones(3, 5).long())[0].notes) == {""}, "several labels"


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


def test_dropped_patches_are_covered_and_groups_colored():
    pictures = displayed(torch.rand(1, 3, 4, 4))
    side = pictures.shape[2] // 2
    kept = torch.tensor([[True, False, True, True]])
    shown = covered(pictures, kept, (2, 2))
    same = (shown == pictures).all(dim=1)[0]
    assert same[:side, :side].all()
    assert not same[:side, side:].any()
    assert same[side:].all()
    tinted = colored(pictures, torch.tensor([[0, 1, 2, 2]]), (2, 2))
    changed = (tinted != pictures).any(dim=1)[0]
    assert not changed[: side - 1].any()
    assert changed[side + 1 :].all()


def test_display_stretches_every_image_alone():
    images = torch.stack([torch.linspace(-3, 1, 12).view(1, 3, 4), torch.full((1, 3, 4), 9.0)])
    pictures = displayed(images)
    assert pictures.shape == (2, 3, 129, 172)
    assert (pictures[0].min(), pictures[0].max()) == (0, 1)
    assert pictures[1].abs().max() == 0
