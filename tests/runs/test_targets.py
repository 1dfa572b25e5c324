import pytest
from omegaconf import OmegaConf

from fewtokens.errors import FewtokensError
from fewtokens.runs.targets import ALLOWED, check, instantiate


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
        # an allowed prefix is no licence for what a module imported
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
    with pytest.raises(FewtokensError, match="To do:"):
        check(target)


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
    check(target)


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
        check("fractions.Fraction")
    monkeypatch.setenv("FEWTOKENS_ALLOW_TARGETS", "fractions.")
    check("fractions.Fraction")
    with pytest.raises(FewtokensError):
        check("fractionsx.Fraction")
    assert all(prefix.split(".")[0] in ("fewtokens", "torch", "timm", "lightning", "torchvision") for prefix in ALLOWED)


def test_wrong_arguments_are_a_sentence_and_bugs_keep_their_traceback() -> None:
    with pytest.raises(FewtokensError, match="Found: colour"):
        instantiate({"_target_": "torch.nn.GELU", "colour": 1})
    with pytest.raises(FewtokensError, match="there"):
        instantiate(OmegaConf.create({"node": {"_target_": "torch.nn.GELU", "approximate": "${gone}"}}).node)
    with pytest.raises(FewtokensError, match="exists"):
        instantiate({"_target_": "fewtokens.tokenizers.base.Tokeniser"})
