"""The experiments of configs/experiment/imagenet: their cost, and two steps of each at toy size."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import CONFIGS
from fewtokens.analysis.cost import macs
from fewtokens.analysis.evaluation import unwrap_compiled
from fewtokens.runs import train as training
from fewtokens.runs.config import instantiate

FOLDER = CONFIGS / "experiment" / "imagenet"
EXPERIMENTS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
COUNTED = ("vit_s16_90", "token_learner_b16_8at3")
TRAINED = ("vit_s16_90", "deit3_s16_800", "token_learner_v11_b16_16at9", "haurum_deit_s")
# The ten methods of Haurum et al., at the rate 0.5
METHODS = {
    **{name: ["tokenizer.build.keep_rate=0.5"] for name in ("top_k", "evit", "k_medoids", "dpc_knn", "dynamic_vit")},
    **{name: ["tokenizer.build.num_tokens=0.5"] for name in ("sit", "sinkhorn")},
    "patch_merger": ["tokenizer.at=[3,6,9]", "tokenizer.build.num_tokens=0.5"],
    "ats": ["tokenizer.at=[3,6,9]", "tokenizer.build.budget=[0.5,0.25,0.125]"],
    "tome": ["tokenizer.at=[3,6,9]", "tokenizer.build.r=[98,49,25]"],
}


def but(names: tuple[str, ...], fast: tuple[str, ...]) -> list:
    """Return the names as parameters of a test that is slow except for some of them."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Return a folder of two classes with three pictures each."""
    noise = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(3):
                pixels = noise.integers(0, 255, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{index}.png")
    return tmp_path


@pytest.mark.parametrize("experiment", but(tuple(EXPERIMENTS), COUNTED))
def test_its_model_costs_what_the_header_says(composed, experiment: str) -> None:
    cfg = composed(f"experiment=imagenet/{experiment}", *offline(experiment))
    with torch.device("meta"):
        model = unwrap_compiled(instantiate(cfg.backbone))
        counted = macs(model, torch.empty(1, *model.sample_shape)) / 1e9
    assert model.sample_shape == (3, cfg.data.image_size, cfg.data.image_size)
    header = (FOLDER / f"{experiment}.yaml").read_text()
    gmacs, total = re.search(r"Cost: ([\d.]+) GMACs per image; ([\d.]+e\d+) multiply-adds", header).groups()
    assert float(gmacs) == pytest.approx(counted, rel=0.01, abs=0.05)
    steps = cfg.trainer.max_steps * 512 if cfg.trainer.max_steps > 0 else cfg.trainer.max_epochs * 1_281_167
    assert float(total) == pytest.approx(3 * counted * 1e9 * steps, rel=0.02)


@pytest.mark.parametrize("experiment", but(tuple(EXPERIMENTS), TRAINED))
def test_it_trains_two_steps_at_toy_size(composed, experiment: str, pictures: Path) -> None:
    numbers = training.run(composed(f"experiment=imagenet/{experiment}", *toy(experiment, pictures)))
    assert numbers["train/epochs"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_haurum_trains(composed, method: str, pictures: Path) -> None:
    name = "haurum_deit_s"
    overrides = [*METHODS[method], *toy(name, pictures), "tokenizer.at=[1,2,3]"]
    training.run(composed(f"experiment=imagenet/{name}", f"tokenizer={method}", *overrides))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_haurum_keeps_the_share(composed, method: str) -> None:
    cfg = composed(
        "experiment=imagenet/haurum_deit_s", f"tokenizer={method}", *METHODS[method], *offline("haurum_deit_s")
    )
    model = unwrap_compiled(instantiate(cfg.backbone)).eval()
    with torch.no_grad():
        left = [tokens.num_patches for tokens in model.trace(torch.randn(1, *model.sample_shape))]
    extra = {"evit": (1, 2, 3)}.get(method, (0, 0, 0))  # the fused tokens
    for block, share, more in zip((3, 6, 9), (0.5, 0.25, 0.125), extra, strict=True):
        assert left[block] <= 196 * share + 2 + more
        assert method == "ats" or left[block] >= 196 * share - 1


def offline(experiment: str) -> list[str]:
    return ["backbone.pretrained=false"] if experiment.startswith("haurum") else []


def toy(experiment: str, pictures: Path) -> list[str]:
    """Return the overrides that make an experiment small."""
    data = [f"data.root={pictures}", "data.num_classes=2", "data.image_size=32", "data.batch_size=2"]
    short = ["trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.max_epochs=1", "trainer.max_steps=2"]
    quiet = ["data.num_workers=0", "logger=none", "measure=none", "test=false", "init_from=null"]
    small = ["backbone.dim=16", "backbone.heads=2", "backbone.depth=4", "backbone.patch_size=8"]
    if experiment.startswith("haurum"):
        small = ["backbone.name=deit_tiny_patch16_224", "+backbone.options.depth=4", *offline(experiment)]
        short.append("trainer.accumulate_grad_batches=1")
    elif experiment.startswith("token_learner"):
        small.append("tokenizer.at=2")
    return [*data, *short, *quiet, *small]
