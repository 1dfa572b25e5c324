"""Every yaml file of every config group composes and builds. The tests find the files themselves."""

import copy
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from conftest import CONFIGS, ROOT
from fewtokens.analysis.flops import flop_counter
from fewtokens.errors import FewtokensError
from fewtokens.runs.compose import checkpoint_of
from fewtokens.runs.config import instantiate
from fewtokens.runs.job import build_trainer


def options(group: str) -> list[str]:
    """Return the names of all options of a config group."""
    folder = CONFIGS / group
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


TOKENIZERS, BACKBONES = options("tokenizer"), options("backbone")


def frames(backbone: str) -> int:
    return 4 if backbone.startswith("vivit_") else 1


# Small sizes keep tests fast, since only whether the parts fit together is tested. There are four blocks, since some
# methods act at every quarter of the depth.
SMALL = ["backbone.dim=32", "backbone.heads=2", "backbone.depth=4"]
IMAGES = ["data=cifar10", "data.image_size=48", "data.num_classes=5"]
# One backbone of each family, and the others that have the same config apart from their sizes.
FAMILIES = {
    "keras_mini_vit": (),
    "timm": (),
    "vit_mini": (),
    "vit_small": ("vit_tiny", "vit_base", "vit_large"),
    "vivit_mini": (),
    "vivit_base": ("vivit_small", "vivit_large"),
}


def test_every_backbone_belongs_to_a_family_whose_members_differ_only_in_size(composed) -> None:
    assert sorted(name for first, others in FAMILIES.items() for name in (first, *others)) == BACKBONES
    for first, others in FAMILIES.items():
        for name in others:
            sizes = [*IMAGES, *SMALL, *(["backbone.temporal_depth=4"] if name.startswith("vivit") else [])]
            one, other = (composed(f"backbone={part}", *sizes).backbone for part in (first, name))
            assert one == other


@pytest.fixture
def node(composed) -> Callable[..., DictConfig]:
    """Return a function that composes a config, or returns a copy of the one with the same overrides."""

    def copied(*overrides: str) -> DictConfig:
        if overrides not in COMPOSED:
            COMPOSED[overrides] = composed(*overrides)
        return copy.deepcopy(COMPOSED[overrides])

    return copied


COMPOSED: dict[tuple[str, ...], DictConfig] = {}  # composing takes longer than these tests


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("backbone", FAMILIES)
def test_every_tokenizer_on_every_backbone_runs_or_is_an_error(node, tokenizer: str, backbone: str) -> None:
    small = ["+backbone.options.depth=4"] if backbone == "timm" else SMALL
    patches = ["backbone.patch_size=8"] if backbone == "vit_mini" else []
    cfg = node(f"backbone={backbone}", *IMAGES, f"data.frames={frames(backbone)}", *small, *patches)
    cfg.tokenizer = node(f"tokenizer={tokenizer}").tokenizer
    shape = (3, 4, 48, 48) if frames(backbone) > 1 else (3, 48, 48)
    try:
        model = instantiate(cfg.backbone)
        logits = model(torch.randn(2, *shape))
    except FewtokensError as error:
        assert re.search(r"\b(Set|Place|Choose|Use|use) ", str(error)), "the error says what to change"
        return
    assert logits.shape == (2, 5)
    assert torch.isfinite(logits).all()
    logits.sum().backward()
    names = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not names, f"no gradient reaches {names}"


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_plain_tokenizer_runs_on_every_backbone(composed, backbone: str) -> None:
    data = ("data=cifar10", "data.image_size=48", f"data.frames={frames(backbone)}")
    cfg = composed("tokenizer=none", f"backbone={backbone}", *data)
    with torch.device("meta"):
        model = instantiate(cfg.backbone)
    assert all(not list(tokenizer.parameters()) for tokenizer in model.encoder.tokenizers)


@pytest.mark.parametrize("inner", ["token_learner", "token_learner_v11_grouped", "patch_merger", "pool"])
def test_the_fuser_wraps_the_tokenizer_given_on_the_command_line(composed, inner: str) -> None:
    cfg = composed("tokenizer=token_fuser", f"tokenizer@tokenizer.inner={inner}")
    assert cfg.tokenizer.at == "0.5:"
    model = instantiate(cfg.backbone)
    wrapped = [type(t.inner).__name__ for t in model.encoder.tokenizers[2:]]
    assert wrapped == [instantiate(composed(f"tokenizer={inner}").tokenizer.build).func.__name__] * 2
    assert torch.isfinite(model(torch.randn(2, 1, 32, 32))).all()


MODELS = ["factorised_encoder", "factorised_self_attention", "factorised_dot_product"]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_every_tokenizer_in_every_model_of_vivit_runs_or_is_an_error(node, tokenizer: str, model: str) -> None:
    cfg = node("backbone=vivit_mini", f"backbone.model={model}", "data.frames=4", "data.image_size=32")
    cfg.tokenizer = node(f"tokenizer={tokenizer}").tokenizer
    try:
        net = instantiate(cfg.backbone)
    except FewtokensError as error:  # when the model is built, not later
        assert model != "factorised_encoder"
        assert re.search(r"\b[Ss]et backbone\.", str(error))
        return
    logits = net(torch.randn(2, 1, 4, 32, 32))
    assert torch.isfinite(logits).all()
    logits.sum().backward()
    names = {name for name, p in net.named_parameters() if p.requires_grad and p.grad is None}
    assert not names, f"no gradient reaches {names}"


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_no_two_layers_share_parameters(node, tokenizer: str) -> None:
    at = [] if tokenizer == "none" else [1, 3]
    cfg = node("backbone.pool=token")  # some need a class token
    cfg.tokenizer = node(f"tokenizer={tokenizer}").tokenizer
    cfg.tokenizer.at = at
    model = instantiate(cfg.backbone)
    seen = [id(p) for module in (*model.encoder.tokenizers, *model.encoder.blocks) for p in module.parameters()]
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize(
    "group", ["optimizer", "schedule", "callbacks", "trainer", "logger", "data", "task", "measure", "init_image"]
)
def test_every_option_of_every_group_builds(composed, group: str, tmp_path: Path) -> None:
    for option in options(group):
        if option == "mlflow" and find_spec("mlflow") is None:  # an optional package
            continue
        cfg = composed(f"{group}={option}", f"paths.data={tmp_path}", "backbone.dim=16", "backbone.heads=2")
        node = cfg[group]
        if group == "trainer":
            OmegaConf.update(node, "accelerator", "cpu")  # this machine may have no GPU
            node.devices, node.strategy = 1, "auto"
            assert build_trainer(node) is not None
            continue
        if group == "init_image" and node:
            node.weights = "a file"
        nodes = [node] if "_target_" in node else list(node.values())
        for part in nodes:
            assert instantiate(part) is not None


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_builds_and_has_a_header(composed, experiment: str) -> None:
    cfg = composed(f"experiment={experiment}", "task.compile=none")  # compilation is slow and tested elsewhere
    assert cfg.name == experiment
    header = (CONFIGS / "experiment" / f"{experiment}.yaml").read_text().split("\n\n")[0]
    assert f"experiment={experiment}" in header, "the header contains the command"
    assert all(callback is None or instantiate(callback) is not None for callback in cfg.callbacks.values())
    if experiment.startswith("imagenet/"):
        assert "Published: " in header
        assert "Not run here" in header
        return  # tests/test_imagenet_experiments.py builds them
    if cfg.data.frames > 1:
        check_video(cfg, header)
        return
    task = instantiate(cfg.task)
    images = torch.randn(2, 1, cfg.data.channels, cfg.data.image_size, cfg.data.image_size)
    assert task.eval()(images).shape == (2, cfg.data.num_classes)


def check_video(cfg: DictConfig, header: str) -> None:
    """Build the video model on the meta device and compare its cost with that in the header."""
    if "static" in cfg.tokenizer.build:
        cfg.tokenizer.build.static = True  # otherwise shapes depend on values, which the meta device does not have
    with torch.device("meta"):
        model = instantiate(cfg.backbone)
        clip = torch.empty(1, *model.sample_shape)
        with torch.no_grad(), flop_counter() as counter:
            logits = model.eval()(clip)
    assert model.sample_shape == (3, cfg.data.frames, cfg.data.image_size, cfg.data.image_size)
    assert logits.shape == (1, cfg.data.num_classes)
    words, gmacs = re.search(r"Cost: (at most [^\d]*)?([\d.]+) GMACs per view", header).groups()
    counted = counter.get_total_flops() / 2e9
    assert float(gmacs) == pytest.approx(counted, rel=0.01 if words else 0, abs=0.05)


@pytest.mark.parametrize("group", ["tokenizer", "backbone"])
def test_every_option_is_described_in_its_first_line(group: str) -> None:
    for option in options(group):
        assert (CONFIGS / group / f"{option}.yaml").read_text().startswith("# ")


def test_environment_yaml_contains_no_versions() -> None:
    environment = yaml.safe_load((ROOT / "environment.yaml").read_text())
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == ["-e .[dev]"]
    assert sorted(entry for entry in environment["dependencies"] if isinstance(entry, str)) == ["pip", "python=3.11"]


def test_sizes_are_set_in_one_place(composed) -> None:
    cfg = composed("data.num_classes=7", "data.image_size=16", "data.channels=3")
    assert (cfg.backbone.num_classes, cfg.backbone.image_size, cfg.backbone.channels) == (7, 16, 3)
    assert cfg.task.num_classes == 7


def test_no_data_set_uses_mixup_by_default(composed) -> None:
    """It would be a hidden part of the recipe."""
    for data in options("data"):
        assert composed(f"data={data}").task.mix.mixup == 0.0
    assert composed("task.mix.mixup=0.2").task.mix.mixup == 0.2
    assert composed("task=multilabel", "data=charades").task.mix.mixup == 0.0


@pytest.mark.parametrize("experiment", options("experiment"))
def test_experiments_without_public_weights_need_some(composed, experiment: str) -> None:
    """They do not train from random weights. OmegaConf's "???" cannot replace the value of the base experiment."""
    cfg = composed(f"experiment={experiment}")
    if cfg.init_from is not None:
        with pytest.raises(FewtokensError, match=r"<run (of vivit_b_m\d_k400|of deit3_[bl]16_800|at 224 pixels)>"):
            checkpoint_of(cfg.init_from)
    elif experiment == "video/surveillance":
        assert OmegaConf.is_missing(cfg.init_image, "weights")
    elif experiment.startswith("video/") and "_l10_" in experiment:
        with pytest.raises(FewtokensError, match=r"^`init_image\.weights` must be a string, got None\.$"):
            instantiate(cfg.init_image)
    else:
        assert "_ats_" not in experiment
        assert experiment == "video/quickstart" or not experiment.startswith("video/") or cfg.init_image.weights


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_can_recompute_its_activations(composed, backbone: str) -> None:
    data = ("data=cifar10", "data.image_size=48", f"data.frames={frames(backbone)}", "tokenizer=none")
    cfg = composed(*data, f"backbone={backbone}", "backbone.grad_checkpointing=true")
    assert composed(*data, f"backbone={backbone}").backbone.grad_checkpointing is False
    with torch.device("meta"):
        assert instantiate(cfg.backbone).encoder.grad_checkpointing


@pytest.mark.parametrize("backbone", [name for name in BACKBONES if name.startswith(("vit_", "vivit_"))])
def test_norm_and_activation_of_every_size(composed, backbone: str) -> None:
    data = ("data=cifar10", "data.image_size=48", f"data.frames={frames(backbone)}", "tokenizer=none")
    small = ("backbone.pool=avg", "backbone.depth=1", "backbone.dim=16", "backbone.heads=2")
    cfg = composed(*data, *small, f"backbone={backbone}", "backbone.options.act_layer=gelu_tanh")
    for norm, after in ((None, backbone.startswith("vit_")), ("before_pool", False), ("after_pool", True)):
        cfg.backbone.norm = norm
        model = instantiate(cfg.backbone)
        assert isinstance(model.vit.fc_norm, torch.nn.LayerNorm) == after
        assert isinstance(model.vit.norm, torch.nn.LayerNorm) != after
        assert "tanh" in type(model.encoder.blocks[0].mlp.act).__name__.lower()
