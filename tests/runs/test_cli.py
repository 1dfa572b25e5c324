"""The command line: quick answers, and a sentence for every mistake."""

import logging
import resource
import subprocess
import sys

import pytest
import yaml

from conftest import ROOT
from fewtokens.errors import FewtokensError
from fewtokens.runs import cli as module


def answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return what train.py prints to stderr for wrong arguments."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        module.command("train", lambda cfg: None)
    assert stop.value.code == 1
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("tokenizer=token_lerner", "Did you mean `tokenizer=token_learner`"),
        ("tokeniser=none", "Did you mean `tokenizer`"),
        ("backbone=vit_huge", "Did you mean `backbone=vit_"),
        ("trainer.max_epoch=3", "Did you mean `trainer.max_epochs`"),
        ("tokenizer.build.num_token=3", "Did you mean `tokenizer.build.num_tokens`"),
        ("num_tokens=3", "Did you mean `tokenizer.build.num_tokens`"),
        ("experiment=cifar10/keras_plane", "Did you mean `experiment=cifar10/keras_plain`"),
        ("tokenizer.at=[3,6", "Quote lists"),
        ("resume=/nowhere", "`resume` must be the directory of a run, which contains config.yaml, got /nowhere"),
        ("ckpt_path=run", "`resume` must be the directory of a run, which contains config.yaml, got run."),
        ("model=resnet", "A model is a backbone with a tokenizer"),
        ("tokenizer=null", "must be the name of an option, got tokenizer=null"),
        ("callbacks=7", "must be the name of an option, got callbacks=7"),
        ("optimizer=[1,1]", r"must be the name of an option, got optimizer=[1,1]"),
        ("tokenizer={a:1}", r"must be the name of an option, got tokenizer={a:1}"),
        ("resume=7", "`resume` must be a run directory, got 7"),
        ("measure=", "The options are cost, default, fewshot, none"),
    ],
)
def test_a_misspelt_override_is_answered_with_the_nearest_name(monkeypatch, capsys, wrong: str, right: str) -> None:
    text = answer(monkeypatch, capsys, wrong)
    assert text.startswith("Error: ")
    assert right in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--cfg", "job"], 0), (["--help"], 0), (["tokenizer=token_lerner"], 1)]
)
def test_answers_without_heavy_imports(arguments: list[str], code: int) -> None:
    program = (
        "import sys, runpy, atexit\n"
        "atexit.register(lambda: print('HEAVY', sorted({'torch', 'lightning', 'timm', 'wandb'} & set(sys.modules))))\n"
        f"sys.argv = ['train.py', *{arguments!r}]\n"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == code, done.stderr
    assert "HEAVY []" in done.stdout
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert seconds < 3, "of the processor, so that a busy machine does not fail it"


class Misconfiguration(Exception):
    """Stands for Lightning's exception, which is recognized by its name."""


Misconfiguration.__name__ = "MisconfigurationException"


def chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            Misconfiguration("No GPU."),
            "Lightning does not accept the settings: No GPU. Check the overrides of `trainer`",
        ),
        (PermissionError(13, "Permission denied", "/there"), "/there: Permission denied. Check that"),
        (chained(ValueError("odd"), PermissionError(13, "Permission denied", "/there")), "/there: Permission denied."),
        (RuntimeError("odd\nsecond line"), "RuntimeError: odd (" + __file__),
    ],
)
def test_every_error_of_a_job_is_a_sentence(monkeypatch, capsys, tmp_path, error: Exception, words: str) -> None:
    def fail(cfg: object) -> None:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", f"hydra.run.dir={tmp_path}"])
    monkeypatch.setenv("FEWTOKENS_TRACEBACK", "0")
    with pytest.raises(SystemExit) as stop:
        module.command("train", fail)
    printed = capsys.readouterr().err
    assert stop.value.code == 1
    assert printed.startswith("Error: ")
    assert words in printed
    assert "Traceback" not in printed
    monkeypatch.setenv("FEWTOKENS_TRACEBACK", "1")
    with pytest.raises(SystemExit):
        module.command("train", fail)
    assert "Traceback" in capsys.readouterr().err


def test_a_key_that_only_other_options_have_is_answered_with_those_of_the_chosen_one(monkeypatch, capsys) -> None:
    text = answer(monkeypatch, capsys, "backbone=vivit_mini", "backbone.patch_size=2")
    assert "There is no key `backbone.patch_size`" in text
    assert "Did you mean `backbone.patch_size`" not in text
    assert "backbone.temporal_depth" in text


def test_a_failing_job_does_not_stop_a_sweep(monkeypatch, capsys, tmp_path) -> None:
    seeds = []

    def fail_first(cfg) -> None:
        seeds.append(cfg.seed)
        if cfg.seed == 0:
            raise FewtokensError("This seed is bad.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "seed=0,1", f"hydra.sweep.dir={tmp_path}"])
    with pytest.raises(SystemExit) as stop:
        module.command("train", fail_first)
    assert (seeds, stop.value.code) == ([0, 1], 1)
    assert "Error: This seed is bad." in capsys.readouterr().err


def test_secrets_are_masked_in_the_files_and_messages_of_a_sweep(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setenv("MY_TOKEN", "value-of-my-token")
    secrets = ["+api_key=abc", "+hf_token=hf_0123456789", "+note=value-of-my-token"]
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "seed=0", *secrets, f"hydra.sweep.dir={tmp_path}"])

    def fail(cfg) -> None:
        logging.getLogger("job").warning("logged %s", cfg.note)
        raise FewtokensError(f"{cfg.hf_token} of {cfg.note} is wrong.")

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        module.command("train", fail)
    printed = "".join(capsys.readouterr())
    content = yaml.safe_load((tmp_path / "multirun.yaml").read_text())
    assert content["api_key"] == content["hf_token"] == content["note"] == "***"
    assert "Error: *** of *** is wrong." in printed
    for text in (printed, *(path.read_text() for path in tmp_path.rglob("*") if path.is_file())):
        assert not any(secret in text for secret in ("api_key=abc", "hf_0123456789", "value-of-my-token"))


def test_outputs_that_cannot_be_written_are_named(command, tmp_path) -> None:
    (tmp_path / "file").touch()
    done = command("train.py", "paths.outputs=file", code=1)
    assert "Not a directory. Check that the path exists, is writable" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("option", [["--cfg", "job"], ["--cfg", "all"], ["--info", "config"]])
def test_secrets_are_masked_in_a_printed_config(monkeypatch, capsys, tmp_path, option: list[str]) -> None:
    monkeypatch.setenv("MY_TOKEN", "value-of-my-token")
    secrets = ["+logger.csv.api_key=abc", "+hf_token=hf_0123456789", "+note=value-of-my-token"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *option, *secrets])
    module.command("train", lambda cfg: None)
    printed = "".join(capsys.readouterr())
    assert "hf_token: ***" in printed
    assert "num_tokens: 8" in printed or option[0] == "--info"
    assert not any(secret in printed for secret in ("abc\n", "hf_0123456789", "value-of-my-token"))
