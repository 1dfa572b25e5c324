import argparse
import json
from pathlib import Path

import pytest
from scipy import stats

from fewtokens.benchmarks.keras_table import __main__ as reproduce
from fewtokens.benchmarks.keras_table import table as keras_table
from fewtokens.errors import FewtokensError
from fewtokens.runs.config import CONFIGS

ARCHIVE, FOLDERS = "CIFAR-10 (official archive)", "CIFAR-10 (JPEG copy, class folders)"


@pytest.fixture
def data(tmp_path):
    root = tmp_path / "cifar"
    (root / "train" / "cat").mkdir(parents=True)
    (root / "train" / "cat" / "1.jpg").touch()
    return root


@pytest.fixture
def args(tmp_path, data):
    return argparse.Namespace(
        outputs=tmp_path / "runs",
        root=data,
        precision="bf16-mixed",
        table=tmp_path / "results" / "keras.csv",
        data_name=None,
        overrides=[],
    )


def write_run(args, row="keras_plain", seed=0, top1=0.56, precision="bf16-mixed"):
    folder = args.outputs / row / str(seed)
    folder.mkdir(parents=True)
    config = {
        "name": f"cifar10/{row}",
        "seed": seed,
        "trainer": {"precision": precision},
        "paths": {"data": str(args.root.parent)},
        "data": {"root": "${paths.data}/cifar", "split": "stratified", "val_images": 10000},
    }
    run = {
        "command": f"python train.py experiment=cifar10/{row}",
        "versions": {"torch": "9.9", "lightning": "8.8"},
        "device": "8 x GPU",
        "measured_on": "CPU",
        "commit": None,
        "written": "2026-01-01T00:00:00+00:00",
    }
    numbers = {"test/top1": top1, "val/top1": 0.5, "train/epochs": 20.0, "cost/gmacs": 0.1015}
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "report.json").write_text(json.dumps(numbers | {"cost/params": 1344650.0}))
    (folder / "metrics.csv").write_text("step,val/top1,train/loss\n9,,2.0\n156,0.51,\n313,0.54,\n470,0.5,\n")
    return folder


def test_a_line_comes_from_the_runs_own_files(args):
    line = keras_table.collect(write_run(args, seed=3))
    assert list(line) == list(keras_table.COLUMNS)
    expected = {"row": "keras_plain", "seed": "3", "test_top1": "0.56", "epochs": "20", "params": "1344650"}
    expected |= {"val_top1": "0.54", "gmacs": "0.1015", "precision": "bf16-mixed"}
    expected |= {"dataset": FOLDERS, "split": "stratified, 10000 held out", "torch": "9.9", "commit": ""}
    expected |= {"measured_on": "CPU"}
    assert {name: line[name] for name in expected} == expected
    assert keras_table.collect(args.outputs / "keras_plain" / "3", "my copy")["dataset"] == "my copy"


def test_files_with_the_old_name_of_a_column_are_read(args):
    line = keras_table.collect(write_run(args))
    args.table.parent.mkdir(parents=True, exist_ok=True)
    names, values = zip(*line.items(), strict=True)
    text = [",".join(names).replace("measured_on", "device"), ",".join(f'"{value}"' for value in values)]
    args.table.write_text("\n".join(text) + "\n")
    assert keras_table.read(args.table) == [line]


def test_an_archive_comes_before_folders_as_in_the_datamodule(data):
    assert keras_table.dataset_name(data) == FOLDERS
    (data / "cifar-10-python.tar.gz").touch()
    assert keras_table.dataset_name(data) == ARCHIVE
    (data / "cifar-10-python.tar.gz").unlink()
    (data / "cifar-10-batches-py").mkdir()
    assert keras_table.dataset_name(data) == ARCHIVE


def test_a_copy_in_another_format_is_not_called_jpeg(data):
    (data / "train" / "cat" / "1.jpg").rename(data / "train" / "cat" / "1.png")
    assert keras_table.dataset_name(data) == "CIFAR-10 (PNG copy, class folders)"


def test_no_data_is_an_error_with_a_remedy(tmp_path):
    with pytest.raises(FewtokensError, match="--data-name"):
        keras_table.dataset_name(tmp_path)


@pytest.mark.parametrize("values", [[56.1, 55.9], [54.0, 55.0, 56.5, 55.2, 54.9]])
def test_the_interval_is_students(values):
    low, high = stats.t.interval(0.95, len(values) - 1, loc=0, scale=stats.sem(values))
    assert keras_table.interval(values) == pytest.approx(high)
    assert keras_table.interval(values) == pytest.approx(-low)


def test_the_interval_of_a_hand_made_sample():  # deviation 1, n = 4, and 3.182 from any printed table of t
    assert keras_table.interval([-(1.5**0.5), 0.0, 0.0, 1.5**0.5]) == pytest.approx(3.182 / 2, abs=1e-3)
    assert keras_table.interval([55.0]) is None


def test_decisions(args):
    folder = args.outputs / "keras_plain" / "0"
    fresh = reproduce.arguments_of("keras_plain", 0, args)
    assert fresh[:2] == ["experiment=cifar10/keras_plain", "seed=0"]
    assert fresh[-2:] == ["measure=cost", f"hydra.run.dir={folder}"]

    write_run(args)
    (folder / "report.json").unlink()  # broke off in the first epoch
    assert reproduce.arguments_of("keras_plain", 0, args) == fresh
    assert not (folder / "metrics.csv").exists()

    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").touch()
    assert reproduce.arguments_of("keras_plain", 0, args) == [f"resume={folder}"]

    (folder / "report.json").write_text("{}")
    assert reproduce.arguments_of("keras_plain", 0, args) is None
    args.precision = "32-true"
    with pytest.raises(FewtokensError, match="--outputs"):
        reproduce.arguments_of("keras_plain", 0, args)


def test_a_failing_run_does_not_stop_the_others(args, monkeypatch):
    started = []
    monkeypatch.setattr(reproduce, "run_child", lambda call: started.append(call[1:3]) or len(started) == 1)
    write_run(args, "keras_8_tokens")
    failures = reproduce.train_all(["keras_plain", "keras_8_tokens"], [0, 1], args)
    assert [a[0].rpartition("/")[2] + a[1] for a in started] == [
        "keras_plainseed=0",
        "keras_plainseed=1",
        "keras_8_tokensseed=1",
    ]
    assert failures == ["keras_plain, seed 0: train.py ended with exit code True"]


def test_an_interruption_says_how_to_go_on(args, monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce, "run_child", interrupted)
    places = ["--root", str(args.root), "--outputs", str(args.outputs), "--table", str(args.table)]
    assert reproduce.main(places) == 130
    assert "continues from here" in capsys.readouterr().err


def test_lines_of_other_machines_stay_and_own_ones_are_replaced(args):
    old = keras_table.collect(write_run(args))
    elsewhere = old | {"dataset": ARCHIVE, "measured_on": "GPU", "test_top1": "0.57"}
    newer = old | {"test_top1": "0.58"}
    shorter = old | {"epochs": "1"}
    merged = keras_table.merge([old, elsewhere], [newer, shorter, old | {"row": "keras_8_tokens"}])
    assert [(x["row"], x["dataset"], x["epochs"], x["test_top1"]) for x in merged] == [
        ("keras_plain", FOLDERS, "1", "0.56"),
        ("keras_plain", FOLDERS, "20", "0.58"),
        ("keras_plain", ARCHIVE, "20", "0.57"),
        ("keras_8_tokens", FOLDERS, "20", "0.56"),
    ]


def test_the_page_says_what_was_run_and_what_was_not(args):
    for seed, top1 in enumerate([0.55, 0.56, 0.57]):
        write_run(args, seed=seed, top1=top1)
    write_run(args, "keras_4_tokens", top1=0.5512, precision="32-true")
    assert reproduce.tabulate(args) == []
    page = args.table.with_suffix(".md").read_text()
    half = stats.t.ppf(0.975, 2) * 1.0 / 3**0.5
    assert f"| 56.00 ± {half:.2f} | 3 (0, 1, 2) | 0.1015 | 0.0184 | 0.0184 |" in page
    assert "| 55.12 (n = 1, no interval) | 1 (0) |" in page
    assert f"## {FOLDERS}, bf16-mixed, 20 epochs" in page
    assert f"## {FOLDERS}, 32-true, 20 epochs" in page
    assert "Not run: keras_8_tokens, keras_4_tokens, keras_8_layers, keras_v11_g4_t4, keras_v11_g8_t4." in page
    assert "No run has used the official archive" in page


def test_a_page_with_a_run_of_every_row_names_none_as_missing(args):
    for row in keras_table.PUBLISHED:
        write_run(args, row)
    assert reproduce.tabulate(args) == []
    assert "not run" not in args.table.with_suffix(".md").read_text().lower()


def test_the_page_depends_on_the_csv_alone(args):
    write_run(args)
    reproduce.tabulate(args)
    page = args.table.with_suffix(".md").read_text()
    args.outputs = args.outputs / "empty"
    assert reproduce.tabulate(args) == []
    assert args.table.with_suffix(".md").read_text() == page


def test_an_unreadable_run_is_reported_and_the_others_counted(args):
    (write_run(args) / "run.json").unlink()
    write_run(args, seed=1)
    assert len(reproduce.tabulate(args)) == 1
    assert [line["seed"] for line in keras_table.read(args.table)] == ["1"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(["--rows", "keras_plane"], "keras_plane"), (["--root", "/nowhere"], "no CIFAR-10 in /nowhere")],
)
def test_mistakes_end_with_a_sentence_before_anything_runs(wrong, message, args, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "run_child", pytest.fail)
    assert reproduce.main([*wrong, "--outputs", str(args.outputs), "--table", str(args.table)]) == 1
    assert message in capsys.readouterr().err


def test_the_published_table_and_the_experiment_files_agree():
    folder = Path(CONFIGS) / "experiment" / "cifar10"
    assert {path.stem for path in folder.glob("keras_*.yaml")} == set(keras_table.PUBLISHED)
    for row, published in keras_table.PUBLISHED.items():
        header = (folder / f"{row}.yaml").read_text()
        numbers = [word for word in published.top1.replace(";", " ").split() if word[0] == "5" and "." in word]
        assert numbers
        for number in [*numbers, f"{published.gflops:.4f}"]:
            assert number in header
