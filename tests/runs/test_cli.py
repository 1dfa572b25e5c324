"""The command line's answers: quick, and a sentence for every mistake."""

import os
import resource
import subprocess
import sys

import pytest

from conftest import ROOT
from fewtokens.runs import cli as module
from fewtokens.runs import distributed as processes


def answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What train.py says to wrong arguments on standard error."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        module.command("train", lambda cfg: None)
    assert stop.value.code == 1
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("tokenizer=token_lerner", "did you mean tokenizer=token_learner"),
        ("tokeniser=none", "did you mean tokenizer"),
        ("backbone=vit_huge", "did you mean backbone=vit_"),
        ("trainer.max_epoch=3", "did you mean trainer.max_epochs"),
        ("tokenizer.build.num_token=3", "did you mean tokenizer.build.num_tokens"),
        ("num_tokens=3", "did you mean tokenizer.build.num_tokens"),
        ("experiment=cifar10/keras_plane", "did you mean experiment=cifar10/keras_plain"),
        ("tokenizer.at=[3,6", "quote values"),
        ("resume=/nowhere", "/nowhere (not there)"),
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


def test_what_resume_and_checkpoint_name() -> None:
    assert module.saved_run(["resume=a/b"]) == "a/b"
    assert module.saved_run(["seed=1", "+checkpoint='a b'"]) == "a b"
    assert module.saved_run(["resume=null"]) is None
    assert module.saved_run(["--config-path", "x", "+resume=a"]) is None, "a child's config is complete"


def test_one_job_hides_the_sweep_from_children_and_cleans_up(monkeypatch, tmp_path) -> None:
    for name in (*processes.OF_THE_LAUNCHER, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "seed=0,1"])

    def inside() -> None:
        with processes.one_job(tmp_path, ["+resume=null"]):
            assert sys.argv[1:5] == ["--config-path", str(tmp_path), "--config-name", "config"]
            assert "-m" not in sys.argv
            assert os.environ[processes.RUN_DIR] == str(tmp_path)
            os.environ["LOCAL_RANK"] = "0"  # as Lightning does
            raise RuntimeError

    with pytest.raises(RuntimeError):
        inside()
    assert sys.argv == ["train.py", "-m", "seed=0,1"]
    assert "LOCAL_RANK" not in os.environ
    assert processes.RUN_DIR not in os.environ
