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
        (
            "optimizer=adamw optimizer.betas=1",
            r"`optimizer.betas` must be \[a number or Tensor, a number or Tensor\], got 1",
        ),
        (
            "optimizer=adamw optimizer.betas=[0.9]",
            r"`optimizer.betas` must be \[a number or Tensor, a number or Tensor\], got \[0.9\]",
        ),
        ("optimizer=adamw optimizer.lr=nan", "`optimizer.lr` must be a number or Tensor, got nan"),
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
        ("data.eval_batch_size=0", "`data.eval_batch_size` must be an int >= 1, got 0"),
        ("+data.batchsize=3", "has no argument `batchsize`. Did you mean `batch_size`"),
    ],
)
def test_the_settings_that_datamodules_share_are_checked_too(composed, override: str, message: str) -> None:
    with pytest.raises(FewtokensError, match=message):
        instantiate(composed(override).data)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("backbone.patch_size=[2]", r"`backbone.patch_size` must be an int or \[height, width\], got \[2\]"),
        ("backbone.options.mlp_ratio=0", "`backbone.options.mlp_ratio` must be a number > 0, got 0"),
        ("backbone.options.mlp_ratio=wide", "`backbone.options.mlp_ratio` must be a number > 0, got 'wide'"),
        ("backbone.options.drop_path_rate=2", r"`backbone.options.drop_path_rate` must be a share in \[0, 1\), got 2"),
        ("backbone.options.drop_path_rate=nan", "`backbone.options.drop_path_rate` must be a share"),
        ("+backbone.options.reg_tokens=-1", "`backbone.options` must be arguments of timm's"),
        ("tokenizer=token_learner_v11 tokenizer.build.hidden=0", "`tokenizer.build.hidden` must be an int >= 1, got 0"),
        (
            "tokenizer=token_learner_v11 tokenizer.build.dropout=nan",
            "`tokenizer.build.dropout` must be a number, got nan",
        ),
        ("backbone=keras_mini_vit backbone.patch_size=2 backbone.key_dim=0", "`backbone.key_dim` must be an int >= 1"),
        ("backbone=keras_mini_vit backbone.patch_size=2 backbone.dropout=1.0", "`backbone.dropout` must be a share"),
        ("task.mix.num_classes=7", "`task.mix.num_classes` must be data.num_classes, which is 10, got 7"),
    ],
)
def test_models_that_cannot_be_are_named(composed, override: str, message: str) -> None:
    with pytest.raises(FewtokensError, match=message):
        instantiate(composed(*override.split()).task)


@pytest.mark.parametrize(
    ("group", "override", "message"),
    [
        ("measure.cost", "measure.cost.num_images=0", "`measure.cost.num_images` must be an int >= 1 or null, got 0"),
        (
            "measure.token_maps",
            "measure.token_maps.num_images=0",
            "`measure.token_maps.num_images` must be an int >= 1",
        ),
        ("measure.token_maps", "measure.token_maps.max_columns=0", "`measure.token_maps.max_columns` must be an int"),
        ("callbacks.stop", "callbacks.stop.ask_every=0", "`callbacks.stop.ask_every` must be an int >= 1, got 0"),
    ],
)
def test_measures_and_callbacks_that_cannot_be_are_named(composed, group: str, override: str, message: str) -> None:
    with pytest.raises(FewtokensError, match=message):
        instantiate(OmegaConf.select(composed(override), group))


def test_a_mandatory_value_that_is_missing_is_named(composed) -> None:
    with pytest.raises(FewtokensError, match=r"`init_image\.weights` must be set"):
        instantiate(composed("init_image=central_frame").init_image)


def test_every_group_must_be_there(composed) -> None:
    cfg = composed()
    check_groups(cfg)
    cfg.measure = None
    with pytest.raises(
        FewtokensError, match=r"`measure` must be an option of configs/measure \(cost, .*, none, predictions\)"
    ):
        check_groups(cfg)


def test_bugs_are_raised_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self, approximate: str = "none") -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("torch.nn.GELU.__init__", broken)
    with pytest.raises(ZeroDivisionError):
        instantiate({"_target_": "torch.nn.GELU"})
