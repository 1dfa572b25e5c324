"""Saving of configs."""

from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from fewtokens.errors import FewtokensError
from fewtokens.runs import config


def test_a_changed_config_keeps_the_one_before(composed, tmp_path: Path) -> None:
    config.save(composed("seed=1", "name=x"), tmp_path)
    config.save(composed("seed=1", "name=x"), tmp_path)
    assert not list(tmp_path.glob("config.*.yaml"))
    config.save(composed("seed=2", "name=x"), tmp_path)
    assert yaml.safe_load((tmp_path / "config.0.yaml").read_text())["seed"] == 1
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["seed"] == 2


def test_a_full_disk_leaves_the_old_config(composed, tmp_path: Path) -> None:
    config.save(composed("seed=1", "name=x"), tmp_path)
    (tmp_path / ".config.yaml.part").symlink_to("/dev/full")
    with pytest.raises(FewtokensError, match=r"Cannot write .*config\.yaml: No space left on device"):
        config.save(composed("seed=2", "name=x"), tmp_path)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["seed"] == 1
    assert not (tmp_path / ".config.yaml.part").is_symlink()


def test_secrets_are_masked_and_tokens_are_not() -> None:
    cfg = OmegaConf.create(
        {"logger": {"wandb": {"api_key": "s3cret", "password": None}}, "num_tokens": 8, "list": [{"SECRET": "s"}]}
    )
    plain = config.plain(cfg)
    assert "s3cret" not in str(plain)
    assert plain["num_tokens"] == 8
    assert plain["list"] == [{"SECRET": "***"}]
    assert plain["logger"]["wandb"]["password"] is None


def test_interpolations_are_kept_or_resolved() -> None:
    cfg = OmegaConf.create({"data": {"size": 8}, "model": {"size": "${data.size}"}, "resume": "there"})
    assert config.plain(cfg) == {"data": {"size": 8}, "model": {"size": "${data.size}"}}
    assert config.plain(cfg, resolve=True) == {"data": {"size": 8}, "model": {"size": 8}}
