"""Reading of run directories, which may be incomplete or hostile."""

import json
from pathlib import Path

import pytest

from fewtokens.errors import FewtokensError
from fewtokens.runs.pages import record
from fewtokens.runs.pages.record import read_metrics, read_run, read_settings
from saved_runs import NUMBERS, save_run


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = read_run(save_run(tmp_path / "run"))
    assert run.numbers == NUMBERS
    assert (run.name, run.status, run.kind, run.problems) == ("digits", "finished", "training", [])
    settings = read_settings(tmp_path / "run")
    assert settings["optimizer.betas"] == "[0.9, 0.999]"
    assert settings["tokenizer.build._target_"] == "fewtokens.tokenizers.tome.ToMe"
    assert run.choice("tokenizer", settings) == "tome"
    assert run.choice("data", {}) == "digits"
    evaluated = read_run(save_run(tmp_path / "evaluated", about={"choices": {"tokenizer": "run"}}))
    assert evaluated.choice("tokenizer", settings) == "ToMe"
    assert read_metrics(tmp_path / "run") == {
        "val/loss": [(1.0, 2.0), (2.0, 1.0)],
        "train/loss_epoch": [(1.0, 2.5), (2.0, 1.5)],
        "val/top1": [(1.0, 0.5), (2.0, 0.75)],
        "train/seconds": [(2.0, 60.0), (2.0, 61.0)],
    }


@pytest.mark.parametrize("text", ["[1", "[1]", "null", "", "[" * 100_000, '{"a": ' * 100_000, '{"a": ' + "9" * 10_000])
@pytest.mark.parametrize("name", ["report.json", "run.json"])
def test_a_file_that_is_no_json_object_is_a_problem(tmp_path: Path, name: str, text: str) -> None:
    save_run(tmp_path / "run")
    (tmp_path / "run" / name).write_text(text)
    [problem] = read_run(tmp_path / "run").problems
    assert problem.startswith(f"{tmp_path / 'run' / name} must be a json object")


def test_only_finite_numbers_of_a_report_are_used(tmp_path: Path) -> None:
    hostile = {"test/top1": float("nan"), "a": float("inf"), "b": "0.5", "c": [1], "d": None, "e": True, "f": {"g": 1}}
    save_run(tmp_path / "run", numbers=hostile)
    run = read_run(tmp_path / "run")
    assert run.numbers == {name: value for name, value in NUMBERS.items() if name != "test/top1"}
    assert "has 7 values that are not finite numbers" in run.problems[0]


def test_entries_of_the_wrong_type_are_not_used(tmp_path: Path) -> None:
    wrong = {"name": {}, "status": [1], "versions": 3, "choices": [1], "traceback": "x", "command": None}
    save_run(tmp_path / "run", about=wrong)
    run = read_run(tmp_path / "run")
    assert (run.name, run.status, run.kind) == ("run", "finished", "run")
    assert (run.versions, run.choices, run.traceback) == ({}, {}, [])


BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "more than 5000 values"),
        ("a: &a [*a]", "must be the config"),
        ("a: !!python/object/apply:os.system ['touch hacked']", "must be the config"),
        ("- a", "it is not a mapping"),
        ("a: [", "must be the config"),
        (f"a: {'x' * 300_000}", "must be the config of a run, of at most"),
    ],
)
def test_a_config_that_is_no_plain_data_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(text)
    with pytest.raises(FewtokensError, match=words):
        read_settings(tmp_path / "run")
    assert not (tmp_path / "hacked").exists()


def test_metrics_may_be_cut_short_or_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "metrics.csv"
    assert read_metrics(tmp_path) == {}
    for text in (
        "",
        "x",
        'step,a\n1,"',
        "step,a\n1,2,3,4\nx,1\n2",
        f"step,a\n1,{'9' * 200_000}\n",
        "step\x00,a\n1,\x00",
    ):
        file.write_text(text)
        assert set(read_metrics(tmp_path)) <= {"a"}
    file.write_bytes(b"step,a\n1,2\n\xff\xfe\n3,4\n")
    assert read_metrics(tmp_path) == {"a": [(1.0, 2.0), (3.0, 4.0)]}
    monkeypatch.setattr(record, "MAX_METRICS", 12)
    assert read_metrics(tmp_path) == {"a": [(1.0, 2.0)]}


def test_other_folders_are_no_runs(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FewtokensError, match=r"is not the directory of a run.*train.py or eval.py"):
            read_run(path)
    (tmp_path / "run.json").write_text(json.dumps({"status": "started"}))
    assert read_run(tmp_path).status == "started"
