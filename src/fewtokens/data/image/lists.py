"""Pictures whose classes are in a file: flat folders with an official list, Hugging Face image folders, ReaL labels."""

import csv
import io
import json
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
import torch
from jaxtyping import Int64
from torch import Tensor

from fewtokens.data.image.folders import PICTURES, ClassFolders
from fewtokens.errors import FewtokensError, check, first_line, listed

log = logging.getLogger(__name__)
METADATA = ("metadata.csv", "metadata.jsonl")  # of a Hugging Face image folder
_NAMES = ("file_name", "filename", "image", "imageid")  # headers of the column of file names
_NUMBERED = re.compile(r"ILSVRC2012_val_(\d{8})")


def read_folder(root: Path, labels: Path) -> ClassFolders:
    """List the pictures below a folder, with the classes of a file.

    Args:
        root: Folder of the part.
        labels: csv or jsonl with a header; lines `name label`; or a label per line, in the order of the sorted names.
            Labels are class names, wnids or numbers. `ILSVRC2012_validation_ground_truth.txt` needs `meta.mat` or
            `map_clsloc.txt` of the same development kit in its folder.

    Returns:
        The pictures. Classes are the sorted labels, numbers in the order of their values.

    Raises:
        FewtokensError: The file has no known format, or pictures and labels do not fit together.
    """
    names = sorted(_pictures(root))
    rows = _rows(labels)
    if rows and rows[0][0] == "":
        if len(rows) != len(names):
            raise FewtokensError(
                f"{labels} must have one label for each of the {len(names)} pictures in {root}, got {len(rows)}. "
                "Complete the folder, or use a list that also names the pictures."
            )
        rows = [(name, label) for name, (_, label) in zip(names, rows, strict=True)]
    found = _match(names, rows, root, labels)
    classes = sorted(set(found.values()), key=lambda x: (not x.isdecimal(), x.zfill(9), x))
    numbers = {name: number for number, name in enumerate(classes)}
    order = sorted((numbers[label], name) for name, label in found.items())
    files = np.array([os.fsencode(name) for _, name in order])
    return ClassFolders(root, classes, files, torch.tensor([number for number, _ in order]))


def _match(names: list[str], rows: list[tuple[str, str]], root: Path, labels: Path) -> dict[str, str]:
    """Return the label of every picture. A row with its full name comes before one with another or no suffix.

    Raises:
        FewtokensError: A picture has no label, or several.
    """
    exact, stems, several = dict[str, str](), dict[str, str](), set[str]()
    for name, label in rows:
        for known, key in ((exact, name), (stems, _stem(name))):
            if known.setdefault(key, label) != label:
                several.add(key)
    keys = {name: name if name in exact else _stem(name) for name in names}
    unlabeled = [name for name, key in keys.items() if key not in exact and key not in stems]
    if unlabeled or not names:
        problem = f"no label for {listed(unlabeled)}" if names else f"but there is no picture in {root}"
        raise FewtokensError(f"{labels} must name the class of every picture in {root}, {problem}.")
    ambiguous = [name for name, key in keys.items() if key in several]
    if ambiguous:
        raise FewtokensError(f"{labels} must name one class of every picture, got several for {listed(ambiguous)}.")
    absent = sorted(stems.keys() - set(map(_stem, names)))
    if absent:
        log.warning("%s names %d pictures that are not in %s: %s", labels, len(absent), root, listed(absent))
    return {name: exact[key] if key in exact else stems[key] for name, key in keys.items()}


def real_labels(path: Path, names: Iterable[str], num_classes: int) -> Int64[Tensor, "n k"]:
    """Read the ReaL labels (Beyer et al., arXiv:2006.07159) of ImageNet's validation pictures.

    Args:
        path: real.json: for each of the 50,000 pictures in the order of their numbers, a list of classes.
        names: File names, which contain ILSVRC2012_val_ and the number.
        num_classes: Number of classes.

    Returns:
        The classes of every picture, filled up with -1. Pictures without a label have -1 only.

    Raises:
        FewtokensError: The file is no list of lists, or lacks a picture.
    """
    try:
        every = json.loads(path.read_text())
        if not all(
            isinstance(row, list) and all(type(x) is int and 0 <= x < num_classes for x in row) for row in every
        ):
            raise TypeError(f"expected lists of numbers from 0 to {num_classes - 1}")
        found = [every[int(_NUMBERED.search(name)[1]) - 1] for name in names]  # type: ignore[index]
    except (OSError, ValueError, TypeError, IndexError, RecursionError) as error:
        raise FewtokensError(
            f"Cannot use the ReaL labels {path}: {first_line(error)}. `data.real_labels` must be real.json of "
            "github.com/google-research/reassessed-imagenet, and the pictures must have ImageNet's names "
            "ILSVRC2012_val_<number>."
        ) from error
    width = max(1, max(map(len, found), default=1))
    return torch.tensor([row + [-1] * (width - len(row)) for row in found])


def has_pictures(root: Path) -> bool:
    """Return whether there is a picture below a folder."""
    return next(iter(_pictures(root)), None) is not None


def _pictures(root: Path) -> Iterable[str]:
    for folder, _, files in os.walk(root, followlinks=True):
        for name in files:
            if name.lower().endswith(PICTURES):
                yield os.path.relpath(os.path.join(folder, name), root)


def _stem(name: str) -> str:
    """Return a name without the suffix of a picture, which some lists omit."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in PICTURES else name


def _rows(path: Path) -> list[tuple[str, str]]:
    """Return the name and the label of every picture; names are empty if the file has none."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if path.suffix == ".jsonl":  # not splitlines, which also splits at characters that names can have
            return [_row(json.loads(line)) for line in text.split("\n") if line.strip()]
        if path.suffix == ".csv":
            lines = [line for line in csv.reader(io.StringIO(text, newline="")) if line]
            if lines[0][0].lower() in _NAMES or any(name.lower() == _NAMES[0] for name in lines[0]):
                return [_row(dict(zip(lines[0], line, strict=True))) for line in lines[1:]]
            return [(line[0], line[1].strip()) for line in lines]
        words = [re.split(r"[\s,]+", line.strip()) for line in text.splitlines() if line.strip()]
        if all(len(line) == 1 for line in words):
            numbers = _devkit(path) if path.name == "ILSVRC2012_validation_ground_truth.txt" else {}
            return [("", numbers[line[0]] if numbers else line[0]) for line in words]
        return [(line[0], line[1]) for line in words]
    except FewtokensError:
        raise
    except (OSError, ValueError, KeyError, IndexError, TypeError, StopIteration, csv.Error, RecursionError) as error:
        raise FewtokensError(
            f"Cannot read the labels in {path}: {type(error).__name__}: {first_line(error)}. Expected csv or jsonl "
            "with the columns file_name and label, lines `name label`, or one label per line."
        ) from error


def _row(row: Any) -> tuple[str, str]:
    if not isinstance(row, dict):
        raise TypeError(f"a line is no object but {row!r:.40}")
    name = next(key for key in row if key.lower() in _NAMES)
    if not isinstance(row[name], str):
        raise TypeError(f"{name} is no text but {row[name]!r:.40}")
    others = [key for key in row if key != name]
    key = "label" if "label" in others else others[0]
    label = str(row[key]).strip()
    # Kaggle's LOC_val_solution.csv: the wnid and its boxes, for every object.
    return row[name], label.split()[0] if key == "PredictionString" else label


def _devkit(path: Path) -> dict[str, str]:
    """Return the wnid of every ILSVRC2012_ID, whose order is not that of the wnids."""
    mat, words = path.with_name("meta.mat"), path.with_name("map_clsloc.txt")
    if mat.exists():
        synsets = scipy.io.loadmat(mat, squeeze_me=True)["synsets"]
        return {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in synsets}
    check(words.exists(), "data.labels", "in one folder with meta.mat or map_clsloc.txt of its kit", str(path))
    lines = [line.split() for line in words.read_text().splitlines()]
    return {number: wnid for wnid, number, *_ in lines}
