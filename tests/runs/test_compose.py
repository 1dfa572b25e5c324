"""Composition on top of saved runs, and which checkpoint a run directory or a file names."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from conftest import CONFIGS, TINY
from fewtokens.errors import FewtokensError
from fewtokens.runs import config
from fewtokens.runs.compose import ConfigLoader, checkpoint_of, config_of, first_values, reference_overrides

Save = Callable[..., Path]


@pytest.fixture
def save_run(composed, tmp_path: Path) -> Save:
    """Write what composition reads of a run: its config and the names of its checkpoints."""

    def save(name: str, *overrides: str, **changes: object) -> Path:
        cfg = composed(*overrides)
        for key, value in changes.items():
            OmegaConf.update(cfg, key, value, force_add=True)
        run = tmp_path / name
        (run / "checkpoints").mkdir(parents=True)
        for file in ("best.ckpt", "last.ckpt"):
            (run / "checkpoints" / file).touch()
        cfg.name = str(cfg.name)  # as a run does, see RunDirectory
        config.save(cfg, run)
        return run

    return save


def test_overrides_apply_on_top_of_the_saved_run(composed, save_run: Save) -> None:
    run = save_run("a", "tokenizer=token_learner_v11", "tokenizer.build.num_tokens=3", "seed=5", *TINY)
    again = composed(f"checkpoint={run}", base="eval")
    assert (again.tokenizer.build.num_tokens, again.seed, again.backbone.dim) == (3, 5, 16)
    changed = composed(f"checkpoint={run}", "tokenizer.build.num_tokens=4", "seed=6", base="eval")
    assert (changed.tokenizer.build.num_tokens, changed.seed) == (4, 6)
    swapped = composed(f"checkpoint={run}", "tokenizer=none", base="eval")
    assert "num_tokens" not in swapped.tokenizer.build
    assert swapped.backbone.dim == 16
    # interpolations are kept, so that a changed fact reaches all that refer to it
    assert composed(f"checkpoint={run}", "data.num_classes=3", base="eval").backbone.num_classes == 3


def test_keys_that_only_the_saved_run_has_can_be_overridden(composed, save_run: Save) -> None:
    run = save_run("a", "tokenizer=tome", "+extra={a: 1}")
    cfg = composed(f"checkpoint={run}", "tokenizer.build.r=2", "extra.a=2", base="eval")
    assert (cfg.tokenizer.build.r, cfg.extra.a) == (2, 2)


def test_a_job_writes_into_its_own_directory(composed, save_run: Save, tmp_path: Path) -> None:
    run = save_run("a", paths={"run": "/there", "data": "d", "outputs": "o"})
    cfg = composed(f"checkpoint={run}", base="eval")
    assert (cfg.paths.run, cfg.paths.data) == (str(tmp_path / "run"), "d")


@pytest.mark.parametrize("base", ["eval", "export", "throughput"])
def test_every_command_composes_on_a_saved_run(composed, save_run: Save, base: str) -> None:
    run = save_run("a", "data=digits", "backbone=vit_mini", "backbone.dim=24")
    cfg = composed(f"checkpoint={run}", base=base)
    assert (cfg.backbone.dim, cfg.data["_target_"].rpartition(".")[2]) == (24, "Digits")
    assert cfg.data.eval_batch_size is None
    assert composed(base=base).backbone.dim != 24


def test_an_experiment_can_name_the_checkpoint(composed, save_run: Save, monkeypatch, tmp_path: Path) -> None:
    run = save_run("a", "tokenizer=token_learner", "backbone.dim=24", "seed=3", "trainer.max_epochs=7")
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    lines = ["# @package _global_", "defaults:", "  - override /tokenizer: tome", f"checkpoint: {run}", "seed: 4"]
    (folder / "reduced.yaml").write_text("\n".join([*lines, "tokenizer: {build: {r: 5}}"]))
    cfg = composed("experiment=reduced", f"hydra.searchpath=[file://{tmp_path / 'mine'}]", base="eval")
    assert (cfg.backbone.dim, cfg.trainer.max_epochs) == (24, 7), "of the run"
    assert (cfg.tokenizer.build.r, cfg.seed) == (5, 4), "of the experiment, on top of the run"


@pytest.mark.parametrize("base", ["train", "export", "throughput"])
def test_an_experiment_can_name_the_run_of_every_command(composed, save_run: Save, tmp_path: Path, base: str) -> None:
    run, key = save_run("a", "backbone.dim=24"), "resume" if base == "train" else "checkpoint"
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    (folder / "again.yaml").write_text(f"# @package _global_\n{key}: {run}\n")
    cfg = composed("experiment=again", f"hydra.searchpath=[file://{tmp_path / 'mine'}]", base=base)
    assert (cfg[key], cfg.backbone.dim) == (str(run), 24)
    assert (HydraConfig.get().run.dir == str(run)) == (base == "train")


def test_a_resumed_run_writes_where_it_wrote(composed, save_run: Save) -> None:
    run = save_run("a", "tokenizer=tome")
    composed(f"resume={run}", "tokenizer.build.r=2")
    hydra = HydraConfig.get()
    assert hydra.run.dir == str(run)
    assert f"{hydra.sweep.dir}/{hydra.sweep.subdir}" == str(run)


def test_a_resumed_run_cannot_move(composed, save_run: Save) -> None:
    run = save_run("a")
    composed(f"resume={run}", f'hydra.run.dir="{run}"')  # as Lightning writes it for child processes
    with pytest.raises(FewtokensError, match="A resumed run stays in its directory"):
        composed(f"resume={run}", "hydra.run.dir=elsewhere")


def test_what_cannot_be_resumed_is_named(composed, save_run: Save, tmp_path: Path) -> None:
    run = save_run("a")
    with pytest.raises(FewtokensError, match="Use checkpoint=<run>"):
        composed(f"resume={run}", base="eval")
    with pytest.raises(FewtokensError, match=r"must be the directory of a run.*init_from"):
        composed(f"resume={run / 'checkpoints' / 'last.ckpt'}")
    (run / "checkpoints" / "last.ckpt").unlink()
    with pytest.raises(FewtokensError, match="ended before its first checkpoint"):
        composed(f"resume={run}")


def test_of_a_sweep_the_first_run_is_taken() -> None:
    assert reference_overrides(["seed=1,2", "checkpoint=a,b", "+resume=null"]) == ["checkpoint=a", "+resume=null"]
    assert reference_overrides(["checkpoint='a b'", "~experiment"]) == ["checkpoint='a b'"]


def test_options_in_folders_are_found_by_glob() -> None:
    path = ConfigSearchPathImpl()
    path.append("here", str(CONFIGS))
    options = ConfigLoader(path).get_group_options("experiment")
    assert {"cifar10/keras_plain", "video/quickstart"} <= set(options)
    found = first_values(["experiment=glob(cifar10/keras_8*)"], ["experiment"], ConfigLoader(path))
    assert found == ["experiment=cifar10/keras_8_layers"]
    assert first_values(["experiment=glob(*)"], ["experiment"]) == []


def test_a_checkpoint_is_found_by_run_or_file(tmp_path: Path) -> None:
    with pytest.raises(FewtokensError, match="gone does not exist"):
        checkpoint_of(str(tmp_path / "gone"))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FewtokensError, match="has neither"):
        checkpoint_of(str(tmp_path))
    last, best = (tmp_path / "checkpoints" / name for name in ("last.ckpt", "best.ckpt"))
    last.touch()
    assert checkpoint_of(str(tmp_path)) == last
    best.touch()
    assert checkpoint_of(str(tmp_path)) == best
    assert checkpoint_of(str(last)) == last


def test_a_checkpoint_without_config_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "bare.ckpt")
    with pytest.raises(FewtokensError, match="without the config of its run"):
        config_of(tmp_path / "bare.ckpt")


def test_a_saved_config_cannot_set_up_hydra(composed, save_run: Save) -> None:
    run = save_run("a")
    saved = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(saved | {"hydra": {"job": {"name": "taken over"}}}))
    composed(f"checkpoint={run}", base="eval")
    assert HydraConfig.get().job.name != "taken over"


def test_present_configs_are_not_changed(composed, save_run: Save) -> None:
    before = {path: path.read_text() for path in CONFIGS.glob("*.yaml")}
    composed(f"checkpoint={save_run('a')}", base="eval")
    assert {path: path.read_text() for path in CONFIGS.glob("*.yaml")} == before
    assert isinstance(composed(), DictConfig)
