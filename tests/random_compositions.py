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
    "moving_digits": [
        "data.image_size=16",
        "data.num_workers=0",
        "data.video_frames=8",
        "data.copies=1",
        "data.batch_size=4",
    ],
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
# Values of which most work, by the key or by the end of it: the ordinary overrides of ordinary users.
USUAL: dict[str, list[str]] = {
    "seed": ["7"],
    "trainer.precision": ["bf16-mixed", "32-true"],
    "trainer.accumulate_grad_batches": ["2"],
    "trainer.gradient_clip_val": ["null", "0.5"],
    "trainer.limit_train_batches": ["2"],
    "trainer.log_every_n_steps": ["1"],
    "trainer.num_sanity_val_steps": ["1"],
    "trainer.val_check_interval": ["1.0"],
    "trainer.enable_progress_bar": ["false"],
    "trainer.enable_model_summary": ["true"],
    "trainer.deterministic": ["true"],
    "trainer.profiler": ["simple"],
    "task.decay": ["all"],
    "task.layer_decay": ["0.75"],
    "task.label_smoothing": ["0.1"],
    "task.mix.mixup": ["0.4"],
    "task.mix.cutmix": ["1.0"],
    "task.mix.probability": ["0.5", "0.0"],
    "optimizer.lr": ["1.0e-3", "1.0"],
    "optimizer.weight_decay": ["0.0", "0.3"],
    "optimizer.momentum": ["0.8"],
    "optimizer.betas": ["[0.8,0.9]"],
    "optimizer.eps": ["1.0e-6"],
    "optimizer.nesterov": ["false"],
    "schedule.warmup": ["0.2", "3", "0.0"],
    "schedule.final": ["0.1"],
    "data.batch_size": ["3", "5"],
    "data.eval_batch_size": ["2", "7"],
    "data.drop_last": ["false"],
    "data.split_seed": ["5"],
    "data.train_transforms": ["[]"],
    "data.image_backend": ["torchvision"],
    "data.interpolation": ["bilinear"],
    "data.crop_pct": ["0.9", "1.0"],
    "data.min_scale": ["0.5"],
    "data.flip": ["0.0"],
    "data.val_images": ["6"],
    "data.stride": ["2"],
    "data.resize": ["24"],
    "data.scale_jitter": ["[1.0,1.0]"],
    "data.decoder": ["pyav", "decord"],
    "data.max_broken": ["0.5"],
    "backbone.depth": ["3", "6"],
    "backbone.heads": ["1", "4"],
    "backbone.dim": ["32"],
    "backbone.norm": ["before_pool", "after_pool"],
    "backbone.grad_checkpointing": ["true"],
    "backbone.dropout": ["0.0"],
    "backbone.key_dim": ["8"],
    "backbone.temporal_depth": ["0", "1"],
    "backbone.model": [
        "factorised_encoder",
        "factorised_self_attention",
        "factorised_self_attention_time_space",
        "factorised_dot_product",
    ],
    "backbone.tubelets.frames": ["1", "4"],
    "backbone.tubelets.sampled_frames": ["2"],
    "backbone.name": ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"],
    "backbone.options.mlp_ratio": ["2.0"],
    "backbone.options.drop_path_rate": ["0.1"],
    "backbone.options.proj_drop_rate": ["0.1"],
    "backbone.options.act_layer": ["gelu_tanh", "silu"],
    "tokenizer.at": ["0.5", "1", "[0,1]", "'0.5:'", "[0.25,0.5,0.75]", "[]"],
    "build.keep_rate": ["0.25", "0.9", "1.0"],
    "build.num_tokens": ["1", "3", "0.25"],
    "build.r": ["1", "2"],
    "build.inflection": ["1.0", "-1.0"],
    "build.proportional": ["false"],
    "build.rule": ["inverse_transform"],
    "build.budget": ["4", "0.5", "all"],
    "build.static": ["true"],
    "build.sizes": ["false"],
    "build.neighbors": ["2"],
    "build.iterations": ["1"],
    "build.significance": ["all"],
    "build.fuse": ["false"],
    "build.normalize": ["true", "false"],
    "build.distance": ["l1", "linf"],
    "build.epsilon": ["0.1"],
    "build.scale": ["false"],
    "build.pooling": ["sum"],
    "build.gelu": ["none"],
    "build.hidden": ["8"],
    "build.groups": ["4"],
    "build.dropout": ["0.1"],
    "build.init": ["official"],
    "build.ratio_weight": ["1.0"],
    "build.seed": ["3"],
    "callbacks.last.every_n_train_steps": ["1"],
    "callbacks.ema.decay": ["0.9"],
    "callbacks.pictures.every_n_epochs": ["1"],
    "max_columns": ["2"],
    "num_images": ["1", "3"],
}
# Keys of the backbone that the config does not list.
ADDED = {
    "qk_norm": "true",
    "reg_tokens": "2",
    "init_values": "0.1",
    "qkv_bias": "false",
    "pos_embed": "none",
    "pre_norm": "true",
    "patch_drop_rate": "0.2",
    "drop_rate": "0.1",
    "attn_drop_rate": "0.1",
    "class_token": "true",
}
NEED_CLASS_TOKEN = ("ats", "top_k")
KEEP_FRAMES = ("none", "token_learner", "token_learner_v11", "patch_merger", "sinkhorn", "sit", "pool", "fixed_pattern")
HOSTILE = {  # values of every type, of which few work
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
    """Return the overrides of composition `number`, the same in every process.

    Two of three are ordinary: the parts fit together, and the values are usual. The others are anything.
    """
    rng = random.Random(number)
    ordinary = rng.random() < 0.67
    data = rng.choice(list(DATA))
    clips = data in ("moving_digits", "kinetics400", "charades")
    backbone = rng.choice(options("backbone"))
    if ordinary or rng.random() < 0.85:  # one that takes these data
        backbone = "vivit_mini" if clips else rng.choice(["vit_mini", "vit_mini", "keras_mini_vit", "timm"])
    tokenizer = rng.choice(options("tokenizer"))
    if ordinary and backbone == "keras_mini_vit" and tokenizer in NEED_CLASS_TOKEN:
        backbone = "vit_mini"
    chosen = [f"data={data}", f"backbone={backbone}", f"tokenizer={tokenizer}"]
    sizes = _sizes(backbone, data)
    if backbone not in ("keras_mini_vit", "timm") and (rng.random() < 0.6 or (ordinary and tokenizer == "ats")):
        sizes.append("backbone.pool=token")  # many methods need a class token
    elif ordinary and tokenizer in NEED_CLASS_TOKEN and backbone != "timm":
        sizes.append("backbone.pool=token")
    chosen += _other_groups(rng, data, ordinary)
    sizes += MEASURE[:1] if "measure=cost" in chosen else MEASURE if "measure=default" in chosen else []
    given = [*chosen, *DATA[data], *sizes, *SHORT]
    return [*given, *(_usual_changes(rng, given, tokenizer) if ordinary else _hostile_changes(rng, given))]


def _sizes(backbone: str, data: str) -> list[str]:
    if backbone == "timm":
        patch = 4 if data == "cifar10" else 16
        sizes = ["depth=4", "embed_dim=48", f"patch_size={patch}"]
        return [*(f"+backbone.options.{size}" for size in sizes), "backbone.name=vit_tiny_patch16_224"]
    patches = ["backbone.tubelets.height=8", "backbone.tubelets.width=8"]
    return [*SMALL, *(patches if backbone.startswith("vivit") else ["++backbone.patch_size=4"])]


def _other_groups(rng: random.Random, data: str, ordinary: bool) -> list[str]:
    """Return options of the groups that each composition sets or leaves as they are."""
    chosen = []
    for group in ("optimizer", "schedule", "callbacks", "logger", "measure"):
        if rng.random() < 0.3:
            chosen.append(f"{group}={rng.choice([name for name in options(group) if name != 'wandb'])}")
    if not any(choice.startswith("measure=") for choice in chosen):
        chosen.append("measure=none")
    if data == "charades" and (ordinary or rng.random() < 0.9):
        chosen.append("task=multilabel")
    elif not ordinary and rng.random() < 0.1:
        chosen.append(f"task={rng.choice(options('task'))}")
    if not ordinary and rng.random() < 0.1:
        chosen.append(f"init_image={rng.choice(options('init_image'))}")
    return chosen


def _usual_changes(rng: random.Random, given: list[str], tokenizer: str) -> list[str]:
    """Return up to six overrides of `USUAL` and `ADDED`, which mostly work together."""
    keys = [key for key, _ in _leaves(composed(given, Path("unused")))]
    found = {}
    for name in rng.sample(sorted(USUAL), 24):
        matching = [key for key in keys if key == name or key.endswith(f".{name}")]
        if len(found) < 6 and matching:
            found[rng.choice(matching)] = rng.choice(USUAL[name])
    over_time = found.get("backbone.model", "").startswith(("factorised_self", "factorised_dot"))
    if over_time and (tokenizer not in KEEP_FRAMES or "backbone.pool=token" in given):
        del found["backbone.model"]
    if "backbone.options" in keys and rng.random() < 0.3:
        name = rng.choice(list(ADDED))
        found[f"+backbone.options.{name}"] = ADDED[name]
    return [f"{key}={value}" for key, value in found.items()][: rng.randrange(7)]


def _hostile_changes(rng: random.Random, given: list[str]) -> list[str]:
    """Return up to three overrides of random keys by random values, mostly of the right type."""
    try:
        cfg = composed(given, Path("unused"))
    except Exception:  # the composition itself says it
        return []
    keys = [(key, kind) for key, kind in _leaves(cfg) if not key.startswith(SPARED)]
    found = []
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        group = rng.choice(["tokenizer", "backbone", "data", "task", "trainer", "optimizer", "schedule", ""])
        own = [entry for entry in keys if entry[0].startswith(f"{group}.")] or keys
        key, kind = rng.choice(own)
        other = rng.choice(list(HOSTILE)) if rng.random() < 0.1 else kind
        found.append(f"{key}={rng.choice(HOSTILE.get(other, HOSTILE[str]))}")
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
