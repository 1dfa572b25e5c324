"""Compare methods by few-shot transfer at equal cost: python -m fewtokens.benchmarks.fewshot [key=value ...]."""

import logging
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from jaxtyping import Float
from matplotlib.figure import Figure
from omegaconf import DictConfig, ListConfig
from torch import Tensor

from fewtokens.analysis.cost import macs
from fewtokens.analysis.evaluation import unwrap_compiled
from fewtokens.analysis.fewshot import Fewshot, Images, summarize
from fewtokens.analysis.flops import GIGA
from fewtokens.analysis.pictures.drawing import write_png
from fewtokens.analysis.throughput import autocast
from fewtokens.backbones.vit import ViT
from fewtokens.benchmarks.budgets import gmacs, settings
from fewtokens.benchmarks.variants import DENSE, backbone_name, sha256, short_name, with_method
from fewtokens.data.cache import cached
from fewtokens.errors import check
from fewtokens.files import replace_file, write_json
from fewtokens.runs import eval as evaluation
from fewtokens.runs import report
from fewtokens.runs.cli import command
from fewtokens.runs.config import instantiate, plain, save
from fewtokens.runs.job import start

log = logging.getLogger(__name__)
OF_PICTURES = ("parts", "labels", "subset", "preset", "crop_pct", "interpolation", "image_backend")  # of data=imagenet


def main() -> None:
    """Run the command."""
    command("fewshot", run)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Probe the features of every method, and write a json, an md and a png file.

    Args:
        cfg: The composed config, see configs/fewshot.yaml.

    Returns:
        The content of the json file: what was measured with which command and versions, and for every method its
        multiply-adds and the accuracies of all probes and draws.

    Raises:
        FewtokensError: The data have no images with one class each, or a setting is invalid.
    """
    _check(cfg)
    directory = Path(HydraConfig.get().runtime.output_dir)
    output = directory / "fewshot" if cfg.output is None else Path(str(cfg.output))
    start(cfg)
    device = torch.device("cuda" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "cpu")
    measure, data, task = (instantiate(node) for node in (cfg.measure.fewshot, cfg.data, cfg.task))
    evaluation.load_weights(cfg, task)
    model, images = unwrap_compiled(task.model).eval().to(device), measure.choose(data)
    positions = images.test[:: max(1, len(images.test) // cfg.counted_images)][: cfg.counted_images]
    counted = torch.cat(list(images.batches(images.test_set, positions, device)))
    with model.encoder.without_reduction():
        dense = macs(model, counted[:1])
    content = _origin(cfg, model, measure, images, device) | {"gmacs_dense": dense / GIGA, "methods": []}
    for entry in (DENSE, *map(str, cfg.methods)):
        for variant, exact in variants(model, entry, cfg.shares, counted):
            record: dict[str, Any] = {"method": exact, "name": short_name(entry).split()[0]}
            record["gmacs"] = gmacs(variant, counted)
            record["share"] = record["gmacs"] / content["gmacs_dense"]
            found = measure.probe(images, *_features(cfg, variant, exact, content, images, device))
            content["methods"].append(record | summarize(found) | {"draws": found})
            log.info(" | ".join(_cells(content)[-1]))
    save(cfg, directory)
    _write(content, output)
    return content


def variants(
    model: ViT, entry: str, shares: Sequence[float], images: Float[Tensor, "b c h w"]
) -> Iterator[tuple[ViT, str]]:
    """Yield the model with a method at every share, and the method with the setting that leads there.

    Args:
        model: The model with the weights of all methods. It stays as it is.
        entry: See `settings`. Nothing is yielded if the weights lack parameters of the method.
        shares: Shares of the dense model's multiply-adds.
        images: The images over which multiply-adds are averaged.
    """
    scratch, _ = with_method(model, entry)
    if scratch is None:
        return
    for exact in settings(scratch.to(images.device), entry, shares, images):
        variant, _ = with_method(model, exact)
        assert variant is not None  # as above, since these settings change no shapes
        yield variant.to(images.device), exact


def table(content: dict[str, Any]) -> list[str]:
    """Return the rows of a Markdown table of all methods."""
    probes = list(content["methods"][0]["draws"])
    headings = [
        "method",
        "GMACs",
        "of dense",
        *(probe.replace("shot", "-shot").replace("knn", "k-NN") for probe in probes),
    ]
    rows = [headings, ["---"] * len(headings), *_cells(content)]
    return [f"| {' | '.join(row)} |" for row in rows]


def plot(content: dict[str, Any]) -> Figure:
    """Return a plot of the accuracy over the number of shots, with a panel for each share."""
    dense, *others = content["methods"]
    shares = content["shares"] or [0.0]
    shots = content["shots"]
    figure = Figure(figsize=(5 * len(shares), 4.5), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(shares), sharey=True, squeeze=False)[0]
    for axis, share in zip(panels, shares, strict=True):
        near = [r for r in others if share == min(shares, key=lambda s, r=r: abs(s - r["share"]))]
        for number, record in enumerate([dense, *near]):
            style = {"color": "black", "marker": "*", "ms": 10} if record is dense else {"color": f"C{number - 1}"}
            marker = {"marker": "osv^D<>pXP"[number % 10], "ms": 4.5, "lw": 1.2, "capsize": 2} | style
            means = [100 * record[f"{k}shot"] for k in shots]
            errors = [100 * record.get(f"{k}shot_interval", 0.0) for k in shots]
            axis.errorbar(shots, means, errors, label=f"{record['name']} ({record['share']:.0%})", **marker)
        axis.set(xlabel="training images per class", xscale="log", xticks=shots, xticklabels=shots)
        axis.set_title(f"about {share:.0%} of the multiply-adds" if share else "all methods")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    panels[0].set_ylabel("accuracy of the linear probe (%)")
    return figure


def _cells(content: dict[str, Any]) -> list[list[str]]:
    rows = []
    for record in content["methods"]:
        spread = {p: record.get(f"{p}_interval") for p in record["draws"]}
        numbers = [
            f"{record[p]:.1%}" + (f" ± {100 * half:.1f}" if half is not None else "") for p, half in spread.items()
        ]
        rows.append([short_name(record["method"]), f"{record['gmacs']:.3f}", f"{record['share']:.1%}", *numbers])
    return rows


def _features(
    cfg: DictConfig, model: ViT, entry: str, content: dict[str, Any], images: Images, device: torch.device
) -> tuple[Float[Tensor, "n c"], Float[Tensor, "m c"]]:
    """Return the features of a method, from the file of an earlier run if it is the same in everything."""
    key = features_key(cfg, entry, content)
    folder = Path(str(cfg.features))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{re.sub(r'[^A-Za-z0-9.]+', '_', entry).strip('_')}.safetensors"

    def extract() -> dict[str, Tensor]:
        with autocast(device, content["precision"]):
            return dict(zip(("few", "test"), images.features(model, device), strict=True))

    found = cached(path, key, extract)
    return found["few"], found["test"]


def features_key(cfg: DictConfig, entry: str, content: dict[str, Any]) -> str:
    """Return what the features of a method depend on: the model, which images they are, and their preprocessing."""
    same = ("weights", "data", "train_positions", "test_positions", "precision")
    settings = plain(cfg, resolve=True)
    data = settings["data"]
    images_are = {name: data.get(name) for name in ("image_size", "mean", "std", "eval_transforms")}
    images_are |= {name: data[name] for name in OF_PICTURES if data.get(name) is not None}
    return str([entry, settings["backbone"], images_are, *(content[name] for name in same)])


def _origin(cfg: DictConfig, model: ViT, measure: Fewshot, images: Images, device: torch.device) -> dict[str, Any]:
    name, data = backbone_name(cfg), getattr(images.datamodule, "description", type(images.datamodule).__name__)
    return {
        "title": cfg.title or f"Few-shot transfer: {data}, {name}",
        "backbone": name,
        "weights": sha256(*model.state_dict().values()),
        "image_size": cfg.data.image_size,
        "precision": measure.precision or cfg.trainer.precision,
        "data": data,
        "train_images": len(images.few),
        "train_positions": sha256(images.few),
        "test_images": len(images.test),
        "test_positions": sha256(images.test),
        "counted_images": min(cfg.counted_images, len(images.test)),
        "shares": list(cfg.shares),
        **{name: getattr(measure, name) for name in ("shots", "draws", "l2", "neighbors", "test_per_class", "seed")},
        "command": shlex.join(["python", "-m", "fewtokens.benchmarks.fewshot", *sys.argv[1:]]),
        **report.environment(device, ("torch", "timm", "fewtokens")),
    }


def _write(content: dict[str, Any], output: Path) -> None:
    title, each = content["title"], content["test_per_class"]
    per_class = f", {each} of every class" if each else ""
    notes = (
        f"Written by `python -m fewtokens.benchmarks.fewshot` at commit {content['commit']} on {content['date']}; the "
        f"command and all draws are in {output.name}.json. Accuracies are means over {content['draws']} draws of the "
        f"training images (seed {content['seed']}) on {content['test_images']:,} test images{per_class}, ± half the "
        "width of the 95 % confidence interval of the mean over draws. All methods see the same images. The k-NN probe "
        f"is among {content['shots'][-1]} images per class. GMACs are those of an image alone, averaged over "
        f"{content['counted_images']} test images. The features were computed in {content['precision']}."
    )
    write_json(content, output.with_name(f"{output.name}.json"))
    write_png(plot(content), output.with_name(f"{output.name}.png"))
    with replace_file(output.with_name(f"{output.name}.md")) as file:
        file.write("\n".join([f"# {title}", "", notes, "", f"![{title}]({output.name}.png)", "", *table(content), ""]))
    print("\n".join(table(content)), f"\nWritten: {output}.json, .md and .png")


def _check(cfg: DictConfig) -> None:
    valid = isinstance(cfg.methods, ListConfig)
    check(valid, "methods", "a list, as in 'methods=[ats,\"tome build.r=8\"]'", cfg.methods)
    valid = isinstance(cfg.shares, ListConfig) and all(isinstance(s, int | float) and 0 < s < 1 for s in cfg.shares)
    check(valid, "shares", "a list of shares between 0 and 1", cfg.shares)
    check(
        isinstance(cfg.counted_images, int) and cfg.counted_images >= 1,
        "counted_images",
        "an int >= 1",
        cfg.counted_images,
    )
    valid = "fewshot" in cfg.measure and cfg.measure.fewshot is not None
    check(valid, "measure", "fewshot", list(cfg.measure))


if __name__ == "__main__":
    main()
