"""Rendering of pages: one HTML file each, which needs neither a network nor JavaScript.

Templates escape every text, and the page forbids scripts and all other requests, in case a text should slip through.
"""

import base64
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from fewtokens.files import replace_file

MAX_PICTURE, MAX_PICTURES = 2 * 2**20, 8 * 2**20  # bytes of one picture, and of all pictures inside a page
MAX_PIXELS = 40_000_000  # a browser would need more memory than it has for a picture that unpacks to more
MOST_PICTURES = 60
TYPES = {".png": "PNG", ".gif": "GIF"}
SHOWS = {
    "token_maps": "Which patches each token represents or each stage keeps, for test images, one per row",
    "token_maps_over_time": "Which patches each token represents or each stage keeps, over the time steps of clips",
    "cost": "How the cost varies from image to image, and the number of tokens after every block",
    "confusion": "Confusion matrix: how often each class was predicted for each true class",
}
EPOCH = re.compile(r"epoch_(\d{1,9})")


@dataclass(frozen=True)
class Picture:
    """A picture of a run, as a page shows it.

    Args:
        name: Its file name.
        shows: What it shows, also for those who cannot see it.
        link: Relative address of the file.
        source: The picture itself as a data URI, or None if it is too large for the page.
        width: In pixels.
        height: In pixels.
    """

    name: str
    shows: str
    link: str
    source: str | None
    width: int
    height: int

    @property
    def of_training(self) -> bool:
        """Return whether it was drawn during training, after an epoch."""
        return EPOCH.match(self.name) is not None


def write(path: Path, template: str, **values: Any) -> None:
    """Write a page from a template of this package, completely or not at all.

    Raises:
        FewtokensError: The file cannot be written.
    """
    text = _environment().get_template(template).render(values)
    with replace_file(path, errors="replace") as file:  # a command line may contain bytes that are no text
        file.write(text)


def picture_files(run: Path) -> list[Path]:
    """Return the png and gif files in `pictures/` of a run: those of its end first, then those of its epochs.

    Links that lead out of the run are skipped, since a page would pass on what they lead to.
    """
    home, folder = run.resolve(), run / "pictures"
    files = [path for path in folder.iterdir() if path.suffix in TYPES] if folder.is_dir() else []
    inside = [path for path in files if path.is_file() and path.resolve().is_relative_to(home)]
    return sorted(inside, key=order)[:MOST_PICTURES]


class Budget:
    """The bytes of pictures that a page still has room for."""

    def __init__(self) -> None:
        self.left = MAX_PICTURES

    def take(self, size: int) -> bool:
        """Return whether a picture of this size has room, and reserve it."""
        fits = size <= min(MAX_PICTURE, self.left)
        self.left -= size if fits else 0
        return fits


def embedded(file: Path, page: Path, budget: Budget) -> Picture | None:
    """Return a picture for a page, inside the page if there is room and else only as a link. None if it is no picture.

    Args:
        file: The picture.
        page: Path of the page.
        budget: The room in the page.
    """
    size = _size(file)
    if size is None:
        return None
    fits = size[0] * size[1] <= MAX_PIXELS and budget.take(file.stat().st_size)
    link = quote(os.path.relpath(file, page.parent))
    return Picture(file.name, _shows(file), link, _data_uri(file) if fits else None, *size)


@cache
def _environment() -> Environment:
    loader = PackageLoader("fewtokens.runs.pages")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def order(path: Path) -> tuple[int, int, str]:
    """Return the place of a picture among others: those of the end of a run first, then those of its epochs."""
    names = list(SHOWS)
    epoch = EPOCH.match(path.stem)
    place = names.index(path.stem) if path.stem in names else len(names)
    return (1, int(epoch.group(1)), path.name) if epoch else (0, place, path.name)


def _size(path: Path) -> tuple[int, int] | None:
    """Return width and height of a picture in pixels, or None if the file is no picture of its type."""
    try:
        with Image.open(path, formats=[TYPES[path.suffix]]) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _shows(path: Path) -> str:
    epoch = EPOCH.match(path.stem)
    if epoch:
        return f"The tokens of the first validation samples after epoch {epoch.group(1)}"
    return SHOWS.get(path.stem, path.stem.replace("_", " "))


def _data_uri(path: Path) -> str:
    return f"data:image/{path.suffix[1:]};base64,{base64.b64encode(path.read_bytes()).decode()}"
