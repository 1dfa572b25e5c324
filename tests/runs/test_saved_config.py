"""A saved config of somebody else is data: each of these ways to more than that ends in an error."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from conftest import TINY
from fewtokens.errors import FewtokensError
from fewtokens.runs import config
from fewtokens.runs.compose import config_of
from fewtokens.runs.config import instantiate
from fewtokens.runs.saved_config import ALLOW_VARIABLE, check_saved

RUN = Path("run/checkpoints/best.ckpt")


SAVED: dict[str, Any] = {}  # composed once, since this takes a second


@pytest.fixture
def saved(composed: Callable[..., DictConfig]) -> dict[str, Any]:
    if not SAVED:
        SAVED.update(save(composed(*TINY)))
    return copy.deepcopy(SAVED)


def save(cfg: DictConfig) -> dict[str, Any]:
    """Return the config as a run saves it, with the name that it has got."""
    return config.plain(cfg) | {"name": str(cfg.name)}


def with_value(saved: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    changed: Any = OmegaConf.create(copy.deepcopy(saved))
    OmegaConf.update(changed, key, value, force_add=True)
    found = OmegaConf.to_container(changed, resolve=False)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["experiment=cifar10/strong_base", "data.root=/data/cifar10"],
        ["experiment=video/quickstart"],
        ["data=imagenet", "backbone=timm", "optimizer=muon", "logger=wandb", "callbacks=[pictures,ema]"],
        ["data=kinetics400", "backbone=vivit_base", "init_image=central_frame", "init_image.weights=x"],
        ["tokenizer=token_fuser", "logger=tensorboard", "schedule=constant"],
        ["tokenizer=none", "logger=none", "measure=none"],
    ],
)
def test_the_configs_of_the_project_are_accepted(composed: Callable[..., DictConfig], overrides: list[str]) -> None:
    saved = save(composed(*overrides))
    checked = check_saved(saved, RUN)
    assert set(saved) - set(checked) <= {"paths"}
    assert all(checked[key] == saved[key] for key in checked)


def test_other_groups_and_hydras_own_settings_are_ignored(saved: dict[str, Any]) -> None:
    evil = {"hydra": {"callbacks": {"x": {"_target_": "torch.hub.load"}}, "job": {"env_set": {ALLOW_VARIABLE: "os"}}}}
    evil |= {"export": {"path": "/tmp/elsewhere"}}
    evil |= {"paths": {"outputs": "/tmp/elsewhere", "run": "/tmp"}, "defaults": [{"override hydra/launcher": "x"}]}
    assert check_saved(saved | evil, RUN).keys() == check_saved(saved, RUN).keys()


TARGETS = [
    "os.system",
    "torch.hub.load",
    "torch.load",
    "fewtokens.data.samplers.os.system",
    "fewtokens.runs.cli.command",
    "timm.layers.create_act.create_act_layer",
    "timm.optim._optim_factory._import_class",
    "torch.nn.Linear",
    "torchvision.transforms.v2.Lambda",
    "lightning.pytorch.callbacks.LambdaCallback",
    "fewtokens.data.video.moving_digits.encode",
    "fewtokens.tokenizers.base.one_per_stage",
    "fewtokens.benchmarks.gpu.run_command",
]


@pytest.mark.parametrize(
    "key", ["tokenizer.build._target_", "backbone._target_", "callbacks.x._target_", "measure.x._target_"]
)
@pytest.mark.parametrize("target", TARGETS)
def test_only_objects_of_the_group_are_built(saved: dict[str, Any], key: str, target: str) -> None:
    with pytest.raises(FewtokensError, match=rf"`{key.replace('.', '[.]')}` in it is not plain data: '{target}' is no"):
        check_saved(with_value(saved, key, target), RUN)


@pytest.mark.parametrize(
    ("key", "target"),
    [
        ("tokenizer.build._target_", "fewtokens.backbones.vit.vit"),
        ("data._target_", "fewtokens.callbacks.loggers.CsvLogger"),
        ("optimizer._target_", "fewtokens.tokenizers.tome.ToMe"),
        ("trainer.profiler._target_", "lightning.pytorch.profilers.PyTorchProfiler"),
        ("backbone.options.norm_layer._target_", "timm.layers.create_act.create_act_layer"),
    ],
)
def test_an_object_of_another_kind_is_refused(saved: dict[str, Any], key: str, target: str) -> None:
    with pytest.raises(FewtokensError, match="is not plain data"):
        check_saved(with_value(saved, key, target), RUN)


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:SECRET}",
        "outputs/${oc.env:HOME}/x",
        "${oc.create:{_target_: os.system}}",
        "\\${oc.create:{_target_: os.system}}",
        "\\\\${oc.create:{_target_: os.system}}",
        "${oc.decode:${oc.env:X}}",
        "${hydra:runtime.cwd}",
        "${now:%Y}",
        "${tokenizer.${oc.env:X}}",
        "${oc.select:data.root,${oc.env:X}}",
        "${",
    ],
)
@pytest.mark.parametrize("key", ["tokenizer.build.pooling", "backbone.options.x", "data.train_transforms"])
def test_values_are_references_or_plain(saved: dict[str, Any], key: str, value: str) -> None:
    group, _, rest = key.partition(".")
    changed = copy.deepcopy(saved)
    node, *leaves = changed[group], *rest.split(".")
    for leaf in leaves[:-1]:
        node = node[leaf]
    node[leaves[-1]] = [value] if leaves[-1] == "train_transforms" else value
    with pytest.raises(FewtokensError, match="uses a resolver, and only references to other keys are allowed"):
        check_saved(changed, RUN)


@pytest.mark.parametrize(
    "key",
    [
        "tokenizer.defaults",
        "backbone.defaults",
        "data.x.defaults",
        "measure.../x",
        "task.a\nb",
        "../x.a",
        "data._args_",
    ],
)
def test_keys_cannot_change_the_composition(saved: dict[str, Any], key: str) -> None:
    group, _, leaf = ("../x", "", "a") if key == "../x.a" else key.partition(".")
    saved.setdefault(group, {}).update({"x": {"defaults": []}} if leaf == "x.defaults" else {leaf: 1})
    with pytest.raises(FewtokensError, match="would change the composition"):
        check_saved(saved, RUN)


@pytest.mark.parametrize(
    "name", ["../x", "/tmp/x", "a/../../x", "", "~/x", "${oc.env:SECRET}", "a\nb", 3, None, {"a": 1}]
)
def test_the_name_is_a_folder_below_the_outputs(saved: dict[str, Any], name: object) -> None:
    with pytest.raises(FewtokensError, match="is not the name of a folder below outputs/"):
        check_saved(saved | {"name": name}, RUN)


@pytest.mark.parametrize(
    "value",
    [
        *("/tmp/x", "../x", "~/x", "${paths.run}/../../x", "${paths.data}/x", "${paths.outputs}", "a/../../b"),
        *("src", "src/fewtokens", "", "file:///tmp/x", "s3://bucket/x", "${data.root}", "${paths.run}${data.root}", 3),
    ],
)
@pytest.mark.parametrize(
    "key", ["logger.csv.directory", "callbacks.last.path", "trainer.default_root_dir", "backbone.options.cache_dir"]
)
def test_everything_is_written_into_the_run_directory(saved: dict[str, Any], key: str, value: object) -> None:
    with pytest.raises(FewtokensError, match="is outside of the run directory"):
        check_saved(with_value(saved, key, value), RUN)


@pytest.mark.parametrize("value", ["/tmp/x", "../x", "a/../../b", "~/x", "memory://x", "${data.root}"])
@pytest.mark.parametrize("key", ["callbacks.best.filename", "trainer.profiler", "measure.cost.num_images"])
def test_names_of_files_do_not_lead_out_of_it(saved: dict[str, Any], key: str, value: str) -> None:
    with pytest.raises(FewtokensError, match="is outside of the run directory"):
        check_saved(with_value(saved, key, value), RUN)
    assert check_saved(with_value(saved, key, "val/loss"), RUN)


def test_further_groups_hold_values_and_build_nothing(saved: dict[str, Any]) -> None:
    assert check_saved(saved | {"extra": {"a": 1}}, RUN)["extra"] == {"a": 1}
    with pytest.raises(FewtokensError, match=r"'os\.system' is no extra of this project"):
        check_saved(saved | {"extra": {"_target_": "os.system"}}, RUN)


def test_data_are_read_where_the_run_read_them(saved: dict[str, Any]) -> None:
    paths = saved["paths"] | {"data": "/datasets"}
    assert check_saved(saved | {"paths": paths}, RUN)["paths"] == {"data": "/datasets"}
    assert "paths" not in check_saved(saved | {"paths": paths | {"data": "${oc.env:SECRET}"}}, RUN)


def test_packages_of_ones_own_are_allowed_by_the_environment_alone(saved, monkeypatch, tmp_path) -> None:
    (tmp_path / "mine.py").write_text("import os\nfrom os import remove\n\nclass New: ...\n")
    monkeypatch.syspath_prepend(tmp_path)

    def check(target: str) -> dict[str, Any]:
        return check_saved(with_value(saved, "tokenizer.build._target_", target), RUN)

    with pytest.raises(FewtokensError, match="is no tokenizer of this project"):
        check("mine.New")
    monkeypatch.setenv(ALLOW_VARIABLE, "mine.")
    assert check("mine.New")["tokenizer"]["build"]["_target_"] == "mine.New"
    for other in ("mine.os.system", "mine.remove", "minex.New", "mine.New.mro"):  # not defined there
        with pytest.raises(FewtokensError, match="is no tokenizer of this project"):
            check(other)
    with pytest.raises(FewtokensError, match="does not exist or cannot be imported"):
        check("mine.Newer")


@pytest.mark.parametrize(
    ("key", "value", "replaced"),
    [
        ("tokenizer.build._target_", "mine.New", "tokenizer.build._target_"),
        ("tokenizer.build._target_", "mine.New", "tokenizer.build"),
        ("tokenizer.build._target_", "mine.New", "tokenizer"),
        ("callbacks.own._target_", "mine.New", "callbacks"),
        ("callbacks.best.dirpath", "/big/disk", "callbacks.best.dirpath"),
        ("name", "../x", "name"),
    ],
)
def test_what_the_command_line_replaces_is_not_used(saved, key: str, value: str, replaced: str) -> None:
    changed = with_value(saved, key, value)
    with pytest.raises(FewtokensError, match="is not plain data"):
        check_saved(changed, RUN)
    checked = check_saved(changed, RUN, ["seed", replaced])
    assert value not in str(checked)
    assert set(checked) == set(saved) - {"paths", "export"}


def test_a_run_with_other_callbacks_is_evaluated_with_those_of_the_project(composed, tmp_path) -> None:
    cfg = composed(*TINY, "name=digits")
    config.save(cfg, tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / "best.ckpt").touch()
    text = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(text.replace("fewtokens.callbacks.seeds.StepSeeds", "mine.Own"))
    given = f"checkpoint={tmp_path / 'run'}"
    with pytest.raises(FewtokensError, match=r"`callbacks\.seeds\._target_` in it is not plain data.*set `callbacks"):
        composed(given, base="eval")
    assert composed(given, "callbacks=default", base="eval").callbacks.seeds._target_.endswith("StepSeeds")
    deleted = composed(given, "~callbacks.seeds", "~logger.csv.directory", base="eval")
    assert "seeds" not in deleted.callbacks
    assert "directory" not in deleted.logger.csv


def test_a_download_and_the_place_of_written_data_are_decided_by_the_command_line(saved) -> None:
    paths = saved["paths"] | {"data": "/datasets"}
    assert check_saved(with_value(saved, "data.download", True), RUN)["data"]["download"] is False
    moving = {"_target_": "fewtokens.data.video.moving_digits.MovingDigits", "root": "/home"}
    checked = check_saved(saved | {"data": moving, "paths": paths}, RUN)
    assert checked["data"]["root"] == "${paths.data}/moving_digits"
    assert "paths" not in checked


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {b: *a}"])
def test_a_circle_of_aliases_is_an_error(saved, text: str) -> None:
    with pytest.raises(FewtokensError, match="more than 20000 values"):
        check_saved(saved | yaml.safe_load(text), RUN)


@pytest.mark.parametrize("content", [b"\xff\xfe\xff", b"[1]", b"backbone: 3", b"a: [", b"", b"x: 2024-13-77"])
def test_a_file_that_is_no_config_is_an_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(FewtokensError, match="comes without the config of its run"):
        config_of(tmp_path / "checkpoints" / "best.ckpt")


def test_a_value_is_resolved_once() -> None:
    node = OmegaConf.create({"_target_": "torch.nn.Dropout", "p": "\\${oc.create:{_target_:os.system}}"})
    with pytest.raises(FewtokensError, match=r"without escaped interpolations|must be a number"):
        instantiate(node)
