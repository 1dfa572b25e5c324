"""The distribution of the cost over images, as a table of bins and as a picture."""

import csv
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from fewtokens.analysis.flops import GIGA, Counts
from fewtokens.analysis.pictures.drawing import write_png
from fewtokens.files import replace_file

BINS = 20


def histogram(counts: Counts) -> list[tuple[float, float, int]]:
    """Return (GMACs from, GMACs to, number of images) for equal bins, or for one bin if all images cost the same."""
    gmacs = counts.macs.double().numpy() / GIGA
    if gmacs.min() == gmacs.max():
        return [(gmacs[0].item(), gmacs[0].item(), len(gmacs))]
    images, edges = np.histogram(gmacs, BINS)
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), images.tolist(), strict=True))


def write_histogram(counts: Counts, path: Path) -> None:
    """Write the histogram as a csv file with a row for each bin."""
    with replace_file(path, newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("gmacs_from", "gmacs_to", "images"))
        rows.writerows((f"{low:.9g}", f"{high:.9g}", images) for low, high, images in histogram(counts))


def write_picture(counts: Counts, dense: int, path: Path) -> None:
    """Draw the histogram, and the tokens after every block, into one png file.

    Args:
        counts: Those of images that do not all cost the same.
        dense: Multiply-adds of an image without the tokenizer.
        path: Path of the file.
    """
    figure = Figure(figsize=(9, 3), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    low, high, images = zip(*histogram(counts), strict=True)
    left.bar(low, images, width=np.subtract(high, low), align="edge", color="0.75")
    single, padded = counts.macs.double().mean().item(), counts.padded.mean().item()
    means = {"mean, alone": single, "mean, padded": padded, "dense": float(dense)}
    for (name, value), color in zip(means.items(), ("C0", "C1", "0.3"), strict=True):
        left.axvline(value / GIGA, color=color, label=f"{name}: {value / GIGA:.3g}")
    left.set(xlabel="GMACs of an image", ylabel="images")
    tokens = counts.tokens.double()
    blocks = np.arange(tokens.shape[1])
    right.fill_between(blocks, tokens.amin(dim=0), tokens.amax(dim=0), color="0.85", label="minimum to maximum")
    right.plot(blocks, tokens.mean(dim=0), color="C0", label="mean")
    right.set(xlabel="blocks applied", ylabel="tokens", ylim=(0, None))
    right.xaxis.get_major_locator().set_params(integer=True)
    for axes in (left, right):
        axes.legend(fontsize=7)
    write_png(figure, path)
