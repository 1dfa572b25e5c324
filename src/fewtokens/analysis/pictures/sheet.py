"""Sheets of pictures: rows and columns with titles, labels, notes and a legend, on white for light and dark pages."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fewtokens.files import replace_file

GAP, MARGIN, SIDE = 6, 12, 10  # pixels between pictures, around the sheet, and between a label and its row
INK, MUTED = (31, 35, 40), (89, 99, 110)
PAGE = 900  # width in pixels at which a page such as GitHub's shows a sheet
READABLE = 13  # size of the text in pixels at that width
SMALLEST, LEGEND_WIDTH = 11, 560  # size of the text, and width of a sheet with a legend, in pixels
Color = tuple[int, int, int]


@dataclass(frozen=True)
class Column:
    """One column of a sheet: a title, and a picture and a note for every row.

    Args:
        title: One or two lines above the column.
        pictures: (rows, 3, H, W), from 0 to 1.
        notes: A line below every picture, or empty.
    """

    title: str
    pictures: Float[Tensor, "b 3 h w"]
    notes: list[str]


@dataclass(frozen=True)
class Key:
    """An entry of a legend: a sentence and, before it, a swatch of what it explains, or none.

    Args:
        text: The sentence.
        swatch: A small picture (3, H, W), from 0 to 1, which is scaled to the height of the text.
    """

    text: str
    swatch: Float[Tensor, "3 h w"] | None = None


class Sheet:
    """A white picture of a fixed size, on which pictures and text are placed.

    Args:
        width: In pixels.
        height: In pixels.
        size: Size of the text in pixels.
    """

    def __init__(self, width: int, height: int, size: int) -> None:
        self.image = Image.new("RGB", (width, height), "white")
        self.size = size
        self._pen = ImageDraw.Draw(self.image)

    def place(self, picture: Float[Tensor, "3 h w"], x: int, y: int) -> None:
        """Place a picture with its upper left corner at a point."""
        self.image.paste(as_image(picture), (x, y))

    def write(self, text: str, x: float | int, y: float | int, anchor: str = "lt", color: Color = INK) -> None:
        """Write lines of text at a point.

        Args:
            text: One or more lines.
            x: Where the text begins, has its middle, or ends.
            y: Where the text begins, has its middle, or ends.
            anchor: "l", "m" or "r" (left, middle, right) for x, and "t", "m" or "b" (top, middle, bottom) for y.
            color: Red, green and blue, from 0 to 255.
        """
        lines = text.split("\n")
        above = {"t": 0.0, "m": 0.5, "b": 1.0}[anchor[1]] * len(lines)
        for number, line in enumerate(lines):
            middle = y + (number + 0.5 - above) * line_height(self.size)
            self._pen.text((x, middle), line, color, font(self.size), anchor[0] + "m")

    def explain(self, legend: Sequence[Key], x: int, y: int, width: int) -> None:
        """Write a legend below a point; see `legend_height`."""
        for key in legend:
            lines, indent = _legend_lines(key, self.size, width)
            if key.swatch is not None:
                size = (self.size, indent - SIDE)
                swatch = F.interpolate(key.swatch[None], size=size, mode="bilinear", antialias=True)[0]
                self.place(swatch, x, y + (line_height(self.size) - self.size) // 2)
            self.write("\n".join(lines), x + indent, y, color=MUTED)
            y += len(lines) * line_height(self.size)


def as_image(picture: Float[Tensor, "3 h w"]) -> Image.Image:
    """Return a picture from 0 to 1 as Pillow has it."""
    return Image.fromarray((picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def draw(columns: Sequence[Column], labels: Sequence[str] = (), legend: Sequence[Key] = ()) -> Image.Image:
    """Return a sheet with one row per image. The text is as large as it must be to be readable on a page.

    Args:
        columns: The columns from left to right. Their pictures are not scaled.
        labels: A label of one or more lines to the left of every row, or none.
        legend: What is written below.
    """
    rows, (high, wide) = len(columns[0].pictures), columns[0].pictures.shape[2:]
    size = _text_size(columns, labels, high, wide)
    left, top, under = _borders(columns, labels, size)
    right, bottom = left + len(columns) * (wide + GAP) - GAP, top + rows * (high + under + GAP) - GAP
    width = max(right + MARGIN, LEGEND_WIDTH if legend else 0)
    below = legend_height(legend, size, width - 2 * MARGIN)
    sheet = Sheet(width, bottom + MARGIN + (below + MARGIN if legend else 0), size)
    for number, column in enumerate(columns):
        x = left + number * (wide + GAP)
        sheet.write(column.title, x + wide / 2, top - 3, "mb")
        for row, (picture, note) in enumerate(zip(column.pictures, column.notes, strict=True)):
            y = top + row * (high + under + GAP)
            sheet.place(picture, x, y)
            sheet.write(note, x + wide / 2, y + high + 1, "mt", MUTED)
    for row, label in enumerate(labels):
        sheet.write(label, left - SIDE, top + row * (high + under + GAP) + high / 2, "rm")
    sheet.explain(legend, MARGIN, bottom + MARGIN, width - 2 * MARGIN)
    return sheet.image


def legend_height(legend: Sequence[Key], size: int, width: int) -> int:
    """Return the height of a legend in pixels, for a size of the text and a width of the lines."""
    return sum(len(_legend_lines(key, size, width)[0]) for key in legend) * line_height(size)


def wrapped(text: str, size: int, width: int) -> list[str]:
    """Break a text into lines of at most `width` pixels, between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or text_width(longer, size) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def text_width(text: str, size: int) -> float:
    """Return the width in pixels of the longest line of a text."""
    return max(font(size).getlength(line) for line in text.split("\n"))


def line_height(size: int) -> int:
    """Return the distance in pixels between two lines of text."""
    return round(1.35 * size)


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Return the font of all text, which matplotlib brings along."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def save_png(image: Image.Image, path: Path) -> None:
    """Write a picture as a png file, completely or not at all. Its folder is created if necessary.

    Raises:
        FewtokensError: The file cannot be written.
    """
    with replace_file(path, "wb") as file:
        image.save(file, format="png", optimize=True)


def _text_size(columns: Sequence[Column], labels: Sequence[str], high: int, wide: int) -> int:
    """Return a size that is readable where a page scales the sheet down, and at which text fits its row and column."""
    size = round(READABLE * max(PAGE, len(columns) * (wide + GAP)) / PAGE)
    texts = [text for column in columns for text in (column.title, *column.notes) if text]
    lines = max((label.count("\n") + 1 for label in labels), default=1)
    while size > SMALLEST and (
        lines * line_height(size) > high or any(text_width(text, size) > wide for text in texts)
    ):
        size -= 1
    return size


def _borders(columns: Sequence[Column], labels: Sequence[str], size: int) -> tuple[int, int, int]:
    """Return the pixels to the left of the pictures, above them, and between each of them and the next."""
    left = MARGIN + (round(max(text_width(label, size) for label in labels)) + SIDE if any(labels) else 0)
    titles = max(column.title.count("\n") + 1 if column.title else 0 for column in columns)
    noted = any(note for column in columns for note in column.notes)
    return left, MARGIN + titles * line_height(size), line_height(size) + 2 if noted else 0


def _legend_lines(key: Key, size: int, width: int) -> tuple[list[str], int]:
    """Return the lines of an entry, and the pixels to the left of them that its swatch takes."""
    indent = 0 if key.swatch is None else round(size * key.swatch.shape[2] / key.swatch.shape[1]) + SIDE
    return wrapped(key.text, size, width - indent), indent
