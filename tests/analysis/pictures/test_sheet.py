"""Sheets hold what they are given, and their text is readable and inside."""

import numpy as np
import pytest
import torch

from fewtokens.analysis.pictures import sheet
from fewtokens.analysis.pictures.sheet import GAP, MARGIN, Column, Key, Sheet, draw, line_height, save_png, text_width
from fewtokens.errors import FewtokensError


def columns(number: int, rows: int = 2, side: int = 64, title: str = "title", note: str = "") -> list[Column]:
    return [Column(title, torch.full((rows, 3, side, side), 0.5), [note] * rows) for _ in range(number)]


def ink(image) -> np.ndarray:
    return np.asarray(image).astype(int).sum(axis=2) < 3 * 255


def test_pictures_are_where_they_belong_to_the_pixel():
    given = [Column(str(i), torch.rand(3, 3, 20, 30), [""] * 3) for i in range(2)]
    pixels = np.asarray(draw(given))
    top = MARGIN + line_height(13)
    for x, column in enumerate(given):
        for y, picture in enumerate(column.pictures):
            found = pixels[top + y * (20 + GAP) :, MARGIN + x * (30 + GAP) :][:20, :30]
            assert np.array_equal(found, (picture * 255).round().byte().permute(1, 2, 0).numpy())
    assert pixels.shape == (top + 3 * (20 + GAP) - GAP + MARGIN, 2 * (30 + GAP) - GAP + 2 * MARGIN, 3)


@pytest.mark.parametrize("number", [1, 9, 17])
def test_nothing_is_written_outside_and_large_sheets_have_large_text(number, monkeypatch):
    sizes = []
    monkeypatch.setattr(sheet, "font", lambda size, original=sheet.font: sizes.append(size) or original(size))
    legend = [Key("what a row is, in words that are long enough for two lines " * 3, torch.rand(3, 10, 40)), Key("b")]
    image = draw(columns(number, side=128, title="block 3\ntoken 1"), ["label: 7\nprediction: 7 ✗"] * 2, legend)
    edge = ink(image)
    assert not edge[[0, 1, -1, -2]].any()
    assert not edge[:, [0, 1, -1, -2]].any()
    assert len(set(sizes[-5:])) == 1
    assert sizes[-1] * min(1, 900 / image.width) >= 11, "readable on a page of 900 pixels"


def test_titles_fit_their_columns_and_labels_their_rows():
    many = columns(17, side=128, title="token 10")
    assert 20 < sheet._text_size(many, [], 128, 128) < sheet._text_size(columns(17, side=128), [], 128, 128)
    assert text_width("token 10", sheet._text_size(many, [], 128, 128)) <= 128
    labels = ["label: great white\nshark, a very…\nprediction: Petri\ndish ✗"]
    size = sheet._text_size(columns(17, side=128), labels, 128, 128)
    assert 4 * line_height(size) <= 128 < 5 * line_height(size)
    assert sheet._text_size(columns(3, side=20, title="100-164 tokens"), [], 20, 20) == sheet.SMALLEST


def test_labels_notes_and_legend_take_place():
    plain, noted = draw(columns(2)), draw(columns(2, note="12"))
    assert noted.height == plain.height + 2 * (line_height(13) + 2)
    labeled = draw(columns(2), ["a", "long label"])
    assert labeled.width > plain.width + text_width("long label", 13)
    assert draw(columns(2), legend=[Key("words")]).height > plain.height + line_height(13)


def test_lines_are_broken_between_words():
    lines = sheet.wrapped("one two three four five six", 13, 80)
    assert " ".join(lines) == "one two three four five six"
    assert len(lines) > 1
    assert all(text_width(line, 13) <= 80 for line in lines)


def test_anchors():
    for anchor, (down, across) in {"lt": (1, 1), "mm": (0, 0), "rb": (-1, -1)}.items():
        page = Sheet(200, 200, 13)
        page.write("two\nlines", 100, 100, anchor)
        y, x = (float(np.mean(where)) - 100 for where in np.nonzero(ink(page.image)))
        assert np.sign(np.round(y / 6)) == down
        assert np.sign(np.round(x / 6)) == across


def test_a_file_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FewtokensError, match="Cannot write"):
        save_png(draw(columns(1)), tmp_path / "file" / "a.png")
