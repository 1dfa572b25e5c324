"""Which targets and arguments of a config are accepted."""

import pytest
from omegaconf import OmegaConf

from fewtokens.errors import FewtokensError
from fewtokens.runs.config import ALLOWED, allowed_target, check_groups, instantiate


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "subprocess.Popen",
        "builtins.eval",
        "eval",
        "torch.load",
        "torch.hub.load",
        "torch.utils.cpp_extension.load_inline",
        "numpy.load",
        "code.InteractiveInterpreter",
        "webbrowser.open",
        "fewtokens.runs.train.run",
        # an allowed prefix does not include what a module has imported
        "fewtokens.data.image.folders.hashlib.md5",
        "fewtokens.backbones.pretrained.torch.load",
        "fewtokens.backbones.pretrained.load_file",
        "fewtokens.data.datamodule.torch.load",
        "torch.optim.adamw.torch.load",
        "torch.nn.modules.module.torch.load",
        "lightning.pytorch.callbacks.model_checkpoint.os.system",
        "lightning.pytorch.Trainer.save_checkpoint",
        "lightning.pytorch.callbacks.ModelCheckpoint.to_yaml",
        "lightning.pytorch.TrainerX",
        "torch.nn.functional",
        "fewtokens.tokenizers.base",
        "",
    ],
)
def test_foreign_targets_are_refused(target: str) -> None:
    with pytest.raises(FewtokensError, match=r"may only call|does not exist"):
        allowed_target(target)


@pytest.mark.parametrize(
    "target",
    [
        "fewtokens.tokenizers.base.Tokenizer",
        "torch.optim.AdamW",
        "torch.nn.GELU",
        "timm.optim.Lamb",
        "lightning.pytorch.Trainer",
        "lightning.pytorch.callbacks.ModelCheckpoint",
        "torchvision.transforms.v2.RandomHorizontalFlip",
    ],
)
def test_allowed_targets_pass(target: str) -> None:
    allowed_target(target)


def test_targets_are_found_at_any_depth_and_behind_interpolations() -> None:
    cfg = OmegaConf.create(
        {
            "hidden": {"_target_": "os.system", "command": "touch /tmp/never"},
            "node": {"_target_": "torch.nn.GELU", "approximate": [{"deep": "${hidden}"}]},
        }
    )
    with pytest.raises(FewtokensError, match=r"os\.system"):
        instantiate(cfg.node)
    built = OmegaConf.create({"name": "os.sys", "node": {"_target_": "${name}tem"}})
    with pytest.raises(FewtokensError, match=r"os\.system"):
        instantiate(built.node)


def test_the_environment_extends_the_list_and_a_config_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FewtokensError):
        allowed_target("fractions.Fraction")
    monkeypatch.setenv("FEWTOKENS_ALLOW_TARGETS", "fractions.")
    allowed_target("fractions.Fraction")
    with pytest.raises(FewtokensError):
        allowed_target("fractionsx.Fraction")
    assert all(prefix.split(".")[0] in ("fewtokens", "torch", "timm", "lightning", "torchvision") for prefix in ALLOWED)


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
