"""Which targets and arguments of a config are accepted."""

import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from fewtokens.errors import FewtokensError
from fewtokens.runs.config import check_groups, instantiate


@pytest.mark.parametrize("target", ["fewtokens.tokenizers.base.Tokeniser", "nothing.at.all", "torch.nn.", "torch", ""])
def test_a_target_that_is_no_class_or_function_is_named(target: str) -> None:
    with pytest.raises(FewtokensError, match=f"`_target_(: {target}` does not exist or cannot|` must be a class)"):
        instantiate({"_target_": target})


def test_a_target_is_found_behind_interpolations() -> None:
    cfg = OmegaConf.create({"name": "torch.nn.GE", "node": {"_target_": "${name}LU", "approx": 1}})
    with pytest.raises(FewtokensError, match=r"torch\.nn\.GELU has no argument `approx`"):
        instantiate(cfg.node)


@pytest.fixture
def own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a package of the user, with a tokenizer."""
    (tmp_path / "mine_of_a_test").mkdir()
    (tmp_path / "mine_of_a_test" / "__init__.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine_of_a_test", raising=False)
    return "mine_of_a_test"


OWN = """
import os
from fewtokens.tokenizers.base import Tokenizer

class Own(Tokenizer):
    def __init__(self, context, step: int = 2):
        super().__init__(context)
"""


def test_packages_of_ones_own_need_no_permission(composed, own_package: str) -> None:
    own = f"tokenizer.build._target_={own_package}.Own"
    model = instantiate(composed("tokenizer=none", own, "tokenizer.at=1").backbone)
    assert type(model.encoder.tokenizers[1]).__name__ == "Own"
    with pytest.raises(FewtokensError, match=r"`tokenizer\.build\.step` must be an int, got 'two'"):
        instantiate(composed("tokenizer=none", own, "+tokenizer.build.step=two").task)


def test_wrong_arguments_are_answered_with_a_sentence() -> None:
    with pytest.raises(FewtokensError, match=r"torch\.nn\.GELU has no argument `approx`. Did you mean `approximate`?"):
        instantiate({"_target_": "torch.nn.GELU", "approx": 1})
    with pytest.raises(FewtokensError, match="cannot be resolved: Interpolation key 'gone' not found"):
        instantiate(OmegaConf.create({"node": {"_target_": "torch.nn.GELU", "approximate": "${gone}"}}).node)
    with pytest.raises(FewtokensError, match="does not exist"):
        instantiate({"_target_": "fewtokens.tokenizers.base.Tokeniser"})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("backbone.patch_size=", "`backbone.patch_size` must be an int"),
        ("backbone=timm backbone.name=null", "`backbone.name` must be a string, got None"),
        ("backbone.dim=1.5", "`backbone.dim` must be an int, got 1.5"),
        ("backbone.depth=[4]", "`backbone.depth` must be an int"),
        ("data.num_classes=ten", "`data.num_classes` must be an int"),  # named as it is set, not where it is used
        ("task.mix=7", "`task.mix` must be Mix or null, got 7"),
        ("task.compile=true", "`task.compile` must be a string"),
        ("task.mix.mixup=a", "`task.mix.mixup` must be a number"),
        ("schedule.warmup=null", "`schedule.warmup` must be an int or a number"),
        ("optimizer.lr=abc", "`optimizer.lr` must be a number"),
        ("optimizer.betas=1", "`optimizer.betas` must be tuple"),
        ("tokenizer.build.num_tokens=many", "`tokenizer.build.num_tokens` must be"),
    ],
)
def test_values_of_the_wrong_type_are_named_as_the_user_types_them(composed, override: str, message: str) -> None:
    with pytest.raises(FewtokensError, match=message):
        instantiate(composed(*override.split()).task)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.batch_size=1.5", "`data.batch_size` must be an int"),
        ("+data.batchsize=3", "has no argument `batchsize`. Did you mean `batch_size`"),
    ],
)
def test_the_settings_that_datamodules_share_are_checked_too(composed, override: str, message: str) -> None:
    with pytest.raises(FewtokensError, match=message):
        instantiate(composed(override).data)


def test_a_mandatory_value_that_is_missing_is_named(composed) -> None:
    with pytest.raises(FewtokensError, match=r"`init_image\.weights` must be set"):
        instantiate(composed("init_image=central_frame").init_image)


def test_every_group_must_be_there(composed) -> None:
    cfg = composed()
    check_groups(cfg)
    cfg.measure = None
    with pytest.raises(FewtokensError, match=r"`measure` must be an option of configs/measure \(cost, default, none\)"):
        check_groups(cfg)


def test_bugs_are_raised_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self, approximate: str = "none") -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("torch.nn.GELU.__init__", broken)
    with pytest.raises(ZeroDivisionError):
        instantiate({"_target_": "torch.nn.GELU"})
