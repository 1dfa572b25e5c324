"""Random compositions of groups and overrides: each builds, trains a step and is evaluated, or ends with a sentence.

    python tests/random_compositions.py 0 5000 [results.jsonl]

runs the compositions number 0 to 4999 in this process and prints those that ended in any other error. With a file, it
goes on after the last number in it.
"""

import contextlib
import io
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict
from PIL import Image

from fewtokens.data.video import moving_digits
from fewtokens.runs import eval as evaluation
from fewtokens.runs import train as training
from fewtokens.runs.cli import UNKNOWN, describe
from fewtokens.runs.compose import compose_on_saved_runs
from fewtokens.runs.config import CONFIGS

SECONDS = 600  # a composition that takes longer hangs, also on a busy machine
# Of every data set: a small part of the data that exists, and sizes for which it trains in less than a second.
DATA: dict[str, list[str]] = {
    "digits": [],
    "cifar10": ["data.image_size=8", "data.val_images=4", "data.batch_size=8"],
    "imagenet": ["data.image_size=16", "data.num_classes=3", "data.num_workers=0", "data.batch_size=4"],
    "moving_digits": ["data.image_size=16", "data.num_workers=0", "data.video_frames=8", "data.copies=1"],
    "kinetics400": [
        "data.image_size=16",
        "data.resize=16",
        "data.num_classes=2",
        "data.num_workers=0",
        "data.frames=4",
        "data.scale_jitter=[1.0,1.2]",
    ],
    "charades": [
        "data.image_size=16",
        "data.resize=16",
        "data.num_classes=3",
        "data.num_workers=0",
        "data.frames=4",
        "data.scale_jitter=[1.0,1.2]",
    ],
}
SHORT = [
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=1",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1",
    "trainer.accelerator=cpu",
]
SMALL = ["backbone.dim=16", "backbone.heads=2", "backbone.depth=4"]
MEASURE = ["measure.cost.num_images=2", "measure.throughput.seconds=0.05", "measure.throughput.batch_size=2"]
# What would start processes, use the network, write elsewhere, or take long by intention.
SPARED = (
    "paths", "hydra", "resume", "init_from", "trainer.devices", "trainer.num_nodes", "trainer.strategy",
    "trainer.default_root_dir", "data.download", "data.root", "data.num_workers", "backbone.pretrained", "task.compile",
    "backbone.weights", "init_image.weights", "measure.throughput.seconds", "logger.wandb", "name",
    "trainer.max_epochs", "trainer.max_steps", "data.video_frames", "data.copies", "data.decode_limit", "data.views",
    "logger.csv.directory", "callbacks.best.dirpath", "callbacks.last.dirpath", "callbacks.stop.path",
)  # fmt: skip
VALUES = {
    bool: ["true", "false", "null", "1", "maybe"],
    int: ["0", "1", "2", "3", "4", "7", "-1", "0.5", "1.5", "null", "many", "[1,2]", "true"],
    float: ["0", "0.0", "0.25", "0.5", "0.99", "1", "1.0", "2.5", "-0.5", "nan", "inf", "null", "much", "[0.5]"],
    str: ["''", "nothing", "0", "null", "[a]", "token", "avg", "true"],
    list: ["[]", "null", "0", "0.5", "'0.5:'", "[0,1]", "[1,1]", "[0.25,2]", "[-1]", "[9]", "[[0]]", "x", "[null]"],
    dict: ["null", "7", "x", "[]"],
}


def options(group: str) -> list[str]:
    """Return the options of a group."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def overrides_of(number: int) -> list[str]:
    """Return the overrides of composition `number`, the same in every process."""
    rng = random.Random(number)
    data = rng.choice(list(DATA))
    backbone = rng.choice(options("backbone"))
    if rng.random() < 0.85:  # mostly one that takes these data
        clips = data in ("moving_digits", "kinetics400", "charades")
        fitting = {True: "vivit_mini", False: rng.choice(["vit_mini", "vit_mini", "keras_mini_vit", "timm"])}
        backbone = fitting[clips]
    chosen = [f"data={data}", f"backbone={backbone}", f"tokenizer={rng.choice(options('tokenizer'))}"]
    sizes = ["+backbone.options.depth=4", "backbone.name=vit_tiny_patch16_224"] if backbone == "timm" else SMALL
    sizes = [*sizes, *([] if backbone == "timm" else ["++backbone.patch_size=4"] if "vivit" not in backbone else
             ["backbone.tubelets.height=8", "backbone.tubelets.width=8"])]  # fmt: skip
    if backbone != "keras_mini_vit" and rng.random() < 0.6:  # many methods need a class token
        sizes += [] if backbone == "timm" else ["backbone.pool=token"]
    for group in ("optimizer", "schedule", "task", "callbacks", "logger", "measure"):
        if rng.random() < (0.05 if group == "task" else 0.25) or (group == "task" and data == "charades"):
            named = [name for name in options(group) if name not in ("wandb",)]
            chosen.append(
                f"{group}={rng.choice(named)}" if data != "charades" or group != "task" else "task=multilabel"
            )
    if rng.random() < 0.05:
        chosen.append(f"init_image={rng.choice(options('init_image'))}")
    measure = next((choice for choice in chosen if choice.startswith("measure=")), None)
    if measure is None:
        chosen.append("measure=none")
    sizes += MEASURE[:1] if measure == "measure=cost" else MEASURE if measure == "measure=default" else []
    return [*chosen, *DATA[data], *sizes, *SHORT, *_changes(rng, [*chosen, *sizes])]


def _changes(rng: random.Random, chosen: list[str]) -> list[str]:
    """Return up to four overrides of random keys by random values, mostly of the right type."""
    try:
        cfg = composed(chosen, Path("unused"))
    except Exception:  # the composition itself says it
        return []
    keys = [(key, kind) for key, kind in _leaves(cfg) if not key.startswith(SPARED)]
    found = []
    for _ in range(rng.choice([0, 0, 1, 1, 2, 3])):
        group = rng.choice(["tokenizer", "backbone", "data", "task", "trainer", "optimizer", "schedule", ""])
        own = [entry for entry in keys if entry[0].startswith(f"{group}.")] or keys
        key, kind = rng.choice(own)
        other = rng.choice(list(VALUES)) if rng.random() < 0.1 else kind
        found.append(f"{key}={rng.choice(VALUES.get(other, VALUES[str]))}")
    return found


def _leaves(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, type]]:
    for name in node:
        key = f"{prefix}{name}"
        child = node._get_node(name)
        if isinstance(child, DictConfig) and not child._is_interpolation() and not child._is_none():
            yield key, dict
            yield from _leaves(child, f"{key}.")
        elif not str(name).startswith("_"):
            value = OmegaConf.select(node, str(name), throw_on_missing=False)
            yield key, list if OmegaConf.is_list(value) else type(value)


def composed(overrides: list[str], directory: Path, base: str = "train") -> DictConfig:
    """Compose a config as a command does."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose(base, overrides, return_hydra_config=True)
    with open_dict(cfg):
        cfg.hydra.runtime.output_dir, cfg.hydra.job.num, cfg.hydra.job.id = str(directory), 0, "test"
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def write_data(root: Path) -> None:
    """Write a few files of every data set."""
    rng = np.random.default_rng(0)
    for part in ("cifar10/train", "cifar10/test", "imagenet/train", "imagenet/val"):
        for kind in range(10 if part.startswith("cifar10") else 3):
            folder = root / part / f"n{kind}"
            folder.mkdir(parents=True)
            for i in range(3):
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    videos = moving_digits.write_once(root / "moving_digits", moving_digits.Recipe(video_frames=8, copies=1))
    for name in ("kinetics400", "charades"):
        for part in ("train", "val"):
            for kind in ("left", "right"):
                (root / name / part / kind).mkdir(parents=True)
                for path in sorted((videos / part / kind).glob("*.mp4"))[:8]:
                    shutil.copy(path, root / name / part / kind / f"{part}-{kind}-{path.name}")
    for part, csv in (("train", "Charades_v1_train.csv"), ("val", "Charades_v1_test.csv")):
        files = sorted((root / "charades" / part).rglob("*.mp4"))
        rows = [f"{path.stem},c00{i % 3} 0.0 0.5;c002 0.1 0.9" for i, path in enumerate(files)]
        (root / "charades" / csv).write_text("\n".join(["id,actions", *rows]) + "\n")


def outcome(number: int, data: Path) -> dict[str, Any]:
    """Run a composition: what it was, and how it ended.

    Args:
        number: The composition.
        data: Folder of `write_data`.
    """
    overrides = [*overrides_of(number), f"paths.data={data}"]
    found: dict[str, Any] = {"number": number, "overrides": " ".join(overrides[:-1]), "end": "trained"}
    with tempfile.TemporaryDirectory() as name, _silent():
        run, sys.argv = Path(name) / "run", ["train.py", *overrides]
        try:
            signal.alarm(SECONDS)
            training.run(composed(overrides, run))
            if number % 4 == 0:
                evaluation.run(composed([f"checkpoint={run}"], Path(name) / "eval", "eval"))
                found["end"] = "evaluated"
        except BaseException as error:
            sentence = describe(error, "train") if isinstance(error, Exception) else repr(error)
            crashed = UNKNOWN in sentence or not isinstance(error, Exception)
            found |= {"end": "crashed" if crashed else "sentence", "error": sentence}
            if crashed:
                found["traceback"] = "".join(traceback.format_exception(error)[-8:])
        finally:
            signal.alarm(0)
    return found


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"no end within {SECONDS} s")


def main(first: int, last: int, results: Path | None) -> int:
    """Run a range of compositions, and return the number of those that crashed."""
    torch.set_num_threads(1)
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    signal.signal(signal.SIGALRM, _too_long)
    compose_on_saved_runs()
    lines = results.read_text().splitlines() if results is not None and results.exists() else []
    done = {json.loads(line)["number"]: json.loads(line)["end"] for line in lines}
    with tempfile.TemporaryDirectory() as data:
        write_data(Path(data))
        for number in sorted(set(range(first, last)) - set(done)):
            found = outcome(number, Path(data))
            done[number] = found["end"]
            if found["end"] == "crashed":
                print(f"{number}: train.py {found['overrides']}\n{found['error']}\n", flush=True)
            if results is not None:
                with results.open("a") as file:
                    file.write(json.dumps(found) + "\n")
    ends = list(done.values())
    print(", ".join(f"{ends.count(end)} {end}" for end in sorted(set(ends))))
    return ends.count("crashed")


if __name__ == "__main__":
    first, last, *rest = sys.argv[1:]
    sys.exit(min(main(int(first), int(last), Path(rest[0]) if rest else None), 1))
