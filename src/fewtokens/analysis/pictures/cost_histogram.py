"""How the cost of images is spread: a table of bins, and a picture."""

import csv
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fewtokens.analysis.flops import Counts

GIGA = 1e9
BINS = 20


def histogram(counts: Counts) -> list[tuple[float, float, int]]:
    """How many images need from so many to so many GMACs: equal bins, or a single one where all need the same."""
    gmacs = counts.macs.double().numpy() / GIGA
    if gmacs.min() == gmacs.max():
        return [(gmacs[0].item(), gmacs[0].item(), len(gmacs))]
    images, edges = np.histogram(gmacs, BINS)
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), images.tolist(), strict=True))


def write_histogram(counts: Counts, path: Path) -> None:
    """The same as a csv file, a row for each bin."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("gmacs_from", "gmacs_to", "images"))
        rows.writerows((f"{low:.9g}", f"{high:.9g}", images) for low, high, images in histogram(counts))


def write_picture(counts: Counts, dense: int, path: Path) -> None:
    """Both pictures, of images that differ, in one png file.

    Args:
        counts: Of images that do not all cost the same.
        dense: Multiply-adds of an image without the tokenizer.
        path: Of the file.
    """
    figure = Figure(figsize=(9, 3), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    low, high, images = zip(*histogram(counts), strict=True)
    left.bar(low, images, width=np.subtract(high, low), align="edge", color="0.75")
    alone, padded = counts.macs.double().mean().item(), counts.padded.mean().item()
    means = {"mean, alone": alone, "mean, padded": padded, "dense": float(dense)}
    for (name, value), colour in zip(means.items(), ("C0", "C1", "0.3"), strict=True):
        left.axvline(value / GIGA, color=colour, label=f"{name}: {value / GIGA:.3g}")
    left.set(xlabel="GMACs of an image", ylabel="images")
    tokens = counts.tokens.double()
    passed = np.arange(tokens.shape[1])
    right.fill_between(passed, tokens.amin(dim=0), tokens.amax(dim=0), color="0.85", label="least to most")
    right.plot(passed, tokens.mean(dim=0), color="C0", label="mean")
    right.set(xlabel="blocks passed", ylabel="tokens alive", ylim=(0, None))
    right.xaxis.get_major_locator().set_params(integer=True)
    for axes in (left, right):
        axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)
