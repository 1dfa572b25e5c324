"""The command that runs methods side by side on one model."""

import json
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir

from conftest import CONFIGS, TINY
from fewtokens.analysis.evaluation import proportion_interval
from fewtokens.benchmarks.suite import __main__ as suite
from fewtokens.benchmarks.suite import page
from fewtokens.benchmarks.suite.trials import FINE_TUNED, OFF_THE_SHELF, Trial, row_of
from fewtokens.errors import FewtokensError
from fewtokens.runs.config import instantiate
from saved_runs import save_run
from suite_rows import suite_content


@pytest.fixture
def content() -> dict[str, Any]:
    return suite_content()


def test_the_page_has_every_number_with_its_interval(content: dict[str, Any], tmp_path: Path) -> None:
    page.write(content, tmp_path / "found")
    assert json.loads((tmp_path / "found.json").read_text()) == content
    text = (tmp_path / "found.md").read_text()
    assert "| tome | r=[1,2] | 85.00% ± 6.99 | 1.0000 | 50% | 1.90 | 190 |" in text
    assert f"± {100 * proportion_interval(0.85, 100):.2f}" == "± 6.99"
    assert "| 1.2000 ± 0.1000 | 60% |" in text  # the method's cost depends on the image
    # Student's interval of two seeds: 12.71 times their standard error of 1 point.
    assert "| tome | r=[1,2] | 1.000 | 50% | 85.00% | 87.00% ± 12.71 | +2.00 | 2 |" in text
    assert "| dense |  | 2.000 | 100% | 90.00% | 91.00% ± " in text
    assert "| token_learner | 8 | 3 | 0.600 | 30% | 80.00% ± 7.77 |" in text
    assert text.index("| token_learner | 8 | 3 |") < text.index("| token_learner | 8 | 6 |")
    for name in ("off", "after", "where"):
        assert f"(found_{name}.png)" in text
        assert (tmp_path / f"found_{name}.png").is_file()


def test_a_page_of_few_rows_has_no_empty_sections(content: dict[str, Any], tmp_path: Path) -> None:
    page.write(content | {"rows": [], "speed": []}, tmp_path / "nothing")
    assert "##" not in (tmp_path / "nothing.md").read_text()
    page.write(content | {"rows": content["rows"][3:6], "speed": []}, tmp_path / "trained")
    assert "| tome | r=[1,2] | 1.000 | 50% | - | 87.00% ± 12.71 | - | 2 |" in (tmp_path / "trained.md").read_text()


@pytest.mark.parametrize(("share", "count", "low", "high"), [(0.5, 100, 0.4038, 0.5962), (0.0, 10, 0.0, 0.2775)])
def test_the_interval_is_wilsons(share: float, count: int, low: float, high: float) -> None:
    assert proportion_interval(share, count) == pytest.approx((high - low) / 2, abs=1e-4)


def test_a_run_has_a_command_and_a_directory_of_its_own() -> None:
    trial = Trial(FINE_TUNED, "token_fuser tokenizer@tokenizer.inner=token_learner at=0.5", None, 3)
    assert trial.arguments("run", ["measure=cost"], ["experiment=x"]) == [
        "train.py", "experiment=x", "init_from=run", "tokenizer=token_fuser",
        "tokenizer@tokenizer.inner=token_learner", "tokenizer.at=0.5", "seed=3", "measure=cost",
    ]  # fmt: skip
    assert trial.directory == Path("fine_tuned/token_fuser_tokenizer_tokenizer.inner_token_learner_at_0.5/3")
    shelf = Trial(OFF_THE_SHELF, "tome build.r=[1,2]", 0.5)
    assert shelf.arguments("run", [], ["experiment=x"]) == [
        "eval.py", "checkpoint=run", "tokenizer=tome", "tokenizer.build.r=[1,2]",
    ]  # fmt: skip
    assert shelf.setting == "r=[1,2]"


def test_a_report_without_costs_is_an_error(tmp_path: Path) -> None:
    trial = Trial(OFF_THE_SHELF, "tome")
    with pytest.raises(FewtokensError, match=r"has no cost/gmacs_std, cost/params\. Remove the directory"):
        row_of(trial, save_run(tmp_path / "a"), "python eval.py", "test/top1")
    complete = save_run(tmp_path / "b", {"cost/gmacs_std": 0.0, "cost/params": 12.0})
    assert row_of(trial, complete, "python eval.py", "test/top1") | {"share": 0.5, "params": 12, "seconds": 61.0} == (
        row_of(trial, complete, "python eval.py", "test/top1")
    )


SMALL = ["data=digits", "data.image_size=16", "backbone=vit_mini", "backbone.patch_size=2", "backbone.dim=16"]
SMALL += ["backbone.heads=2", "backbone.pool=token", "trainer=cpu", "counted_images=4"]


def test_every_method_gets_the_setting_of_every_share(composed) -> None:
    lists = ["off_the_shelf=[tome,'pool at=2',sit]", "fine_tuned=[none,sit,'token_learner at=1']", "shares=[0.8,0.6]"]
    cfg = composed(*SMALL, *lists, "seeds=[0,1]", base="suite")
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        model, data = instantiate(cfg.backbone).eval(), instantiate(cfg.data)
        data.prepare_data()
        data.setup("test")
        found = list(suite.trials(cfg, model, suite._images(data, 4)))
    shelf = [trial for trial in found if trial.part == OFF_THE_SHELF]
    assert [(trial.option, trial.wanted) for trial in shelf] == [
        ("none", None), ("tome", 0.8), ("tome", 0.6), ("pool", None),
    ], "SiT has parameters"  # fmt: skip
    trained = [(trial.option, trial.wanted, trial.seed) for trial in found if trial.part == FINE_TUNED]
    assert trained == [("none", None, 0), ("none", None, 1), ("sit", 0.5, 0), ("sit", 0.5, 1),
                       ("token_learner", 0.5, 0), ("token_learner", 0.5, 1)]  # fmt: skip
    assert "num_tokens=" in found[-1].method


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("parts=[shelf]", "`parts` must be 'off_the_shelf' or 'fine_tuned' or 'speed'"),
        ("shares=[50]", "`shares` must be shares between 0 and 1"),
        ("seeds=[a]", "`seeds` must be a list of ints"),
        ("trainer.limit_test_batches=2", "`trainer.limit_test_batches` must be null: intervals and comparisons are"),
        ('evaluate=["trainer.limit_test_batches=2"]', "`trainer.limit_test_batches` must be null"),
        ("seed=0", "`checkpoint` must be a run of a dense model"),
    ],
)
def test_errors_are_sentences(composed, wrong: str, says: str) -> None:
    with pytest.raises(FewtokensError, match=says):
        suite._check(composed(*SMALL, wrong, base="suite"))


@pytest.mark.slow
def test_runs_are_made_once_and_one_more_method_is_added(command, tmp_path: Path) -> None:
    dense, out = tmp_path / "dense", tmp_path / "found"
    tiny = [part for part in TINY if not part.startswith("tokenizer")]
    command("train.py", *tiny, "backbone.pool=token", "tokenizer=none", f"hydra.run.dir={dense}")
    short = json.dumps([*tiny, "backbone.pool=token"])
    arguments = [f"checkpoint={dense}", f"train={short}", f"output={out}", "shares=[0.7]", f"runs={tmp_path / 'runs'}"]
    arguments += ['evaluate=["measure=cost","trainer=cpu"]', "counted_images=4", "speed.seconds=0.1", "speed.batch=4"]
    command("fewtokens.benchmarks.suite", *arguments, "off_the_shelf=[tome]", "fine_tuned=[none]")
    first = json.loads(Path(f"{out}.json").read_text())
    assert [(row["part"], row["method"].split()[0]) for row in first["rows"]] == [
        (OFF_THE_SHELF, "none"), (OFF_THE_SHELF, "tome"), (FINE_TUNED, "none"),
    ]  # fmt: skip
    assert [row["wanted"] for row in first["rows"]] == [None, 0.7, None]
    assert [record["tokenizer"].split()[0] for record in first["speed"]] == ["none", "tome"]
    assert str(tmp_path) not in json.dumps(first)

    error = command("fewtokens.benchmarks.suite", *arguments, "method='sit at=1 build.x=1'", code=1).stderr
    assert "`method` has an invalid setting in 'sit at=1 build.x=1'" in error
    command("fewtokens.benchmarks.suite", *arguments, "method='sit at=1'")
    second = json.loads(Path(f"{out}.json").read_text())
    assert second["rows"][:3] == first["rows"]
    assert [(row["part"], row["method"].split()[0]) for row in second["rows"][3:]] == [(FINE_TUNED, "sit")]
    assert [record["tokenizer"].split()[0] for record in second["speed"]] == ["none", "tome", "sit"]

    command("train.py", *tiny, "backbone.pool=token", "tokenizer=none", "seed=1", f"hydra.run.dir={dense}2")
    error = command("fewtokens.benchmarks.suite", *arguments, f"checkpoint={dense}2", code=1).stderr
    assert "has the rows of another dense model" in error
