"""report.html: what it shows, and that no text of a run can do anything on it."""

import os
from pathlib import Path

import pytest

from fewtokens.errors import FewtokensError
from fewtokens.runs.pages import page, run_page
from saved_runs import Page, save_picture, save_run

SCRIPT = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"


def written(run: Path) -> Page:
    found = Page(run_page.write(run))
    found.check()
    return found


def test_the_page_of_a_finished_run(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run")
    save_picture(run / "pictures" / "epoch_2.png")
    shown = written(run)
    for words in ("finished", "90.00%", "50% fewer than with all tokens", "60", "1.50", "tome · digits · seed 0",
                  "2026-01-01 00:00:00 UTC", "python train.py seed=0", "c0ffee", "torch 2.0", "_target_:",
                  "Tokens after every block", "validation", "During training (1)"):  # fmt: skip
        assert words in shown.text, words
    assert [text["aria-label"] for text in shown.all("svg") if "aria-label" in text] == [
        "Loss. validation: from 2 to 1; training: from 2.5 to 1.5.",
        "Accuracy. validation: from 50.00% to 75.00%.",
    ]
    assert len(shown.all("img")) == 2
    assert {link["href"] for link in shown.all("a")} == {"report.json", "metrics.csv", "config.yaml", "run.json"}


def test_a_plain_transformer_is_not_compared_with_itself(tmp_path: Path) -> None:
    shown = written(save_run(tmp_path / "run", {"cost/gmacs": 10.0, "throughput/images_per_s": 40.1}))
    assert "40" in shown.text
    for absent in ("times as fast", "fewer than with all tokens", "gain"):
        assert absent not in shown.text


def test_no_text_of_a_run_is_markup(tmp_path: Path) -> None:
    names = ("name", "status", "command", "last_command", "commit", "device", "reason", "started")
    about = dict.fromkeys(names, SCRIPT)
    about |= {"choices": {"data": SCRIPT}, "versions": {SCRIPT: SCRIPT}, "traceback": [SCRIPT], "seed": SCRIPT}
    numbers = {SCRIPT: 1.0, f"cost/tokens_block_{SCRIPT}": 2.0}
    run = save_run(tmp_path / "run", numbers, about, {"data": {SCRIPT: SCRIPT}})
    (run / "metrics.csv").write_text("step,val/<script>alert(1)</script>\n1,1\n2,2\n")
    save_picture(run / "pictures" / "<script>alert(1)<!--.png".replace("/", ""))
    save_picture(run / "pictures" / "javascript:alert(1).png", 900)
    shown = written(run)
    assert SCRIPT in shown.text
    assert len(shown.all("img")) == len(list((run / "pictures").iterdir())) - 1


def test_texts_that_are_not_unicode_do_not_stop_it(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", about={"command": "python train.py name=\udcff", "reason": "\x00"})
    assert "name=?" in written(run).text


@pytest.mark.parametrize("status", ["failed", "stopped", "started"])
def test_the_page_of_a_run_without_an_end_says_why(tmp_path: Path, status: str) -> None:
    run = save_run(tmp_path / "run", about={"status": status, "reason": "No space left", "traceback": ["Traceback: x"]})
    (run / "report.json").unlink()
    shown = written(run)
    for words in (status, "No space left", "Traceback: x", "The run has no results"):
        assert words in shown.text


def test_a_run_that_logged_and_measured_nothing_has_a_page(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run")
    (run / "report.json").write_text('{"test/top1": 0.5}')
    for name in ("metrics.csv", "config.yaml"):
        (run / name).unlink()
    (run / "pictures" / "token_maps.png").unlink()
    shown = written(run)
    assert "50.00%" in shown.text
    for absent in ("Curves", "Pictures", "GMACs", "composed config"):
        assert absent not in shown.text


def test_a_page_of_unreadable_files_names_them(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run")
    (run / "report.json").write_text("{")
    (run / "config.yaml").write_text("x" * 300_000)
    (run / "pictures" / "token_maps.png").write_bytes(b"no picture")
    shown = written(run)
    assert "report.json must be a json object" in shown.text
    assert "config.yaml must be the config of a run" in shown.text
    assert shown.all("img") == []


def test_zeros_and_extremes_are_numbers_like_others(tmp_path: Path) -> None:
    numbers = {"cost/gmacs": 0.0, "cost/gmacs_dense": 0.0, "throughput/images_per_s_dense": 0.0,
               "train/seconds": -1e300, "test/top1": 1e308, "cost/tokens_block_00": 0.0,
               "cost/tokens_block_01": -1.0}  # fmt: skip
    run = save_run(tmp_path / "run", numbers)
    (run / "metrics.csv").write_text("step,val/loss\n1,1e308\n2,-1e308\n3,0.5\n4,0.25\n")
    assert "from 0.5 to 0.25" in written(run).source


def test_large_pictures_are_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = save_run(tmp_path / "run")
    for name in ("large #1.png", "small.png"):
        save_picture(run / "pictures" / name, 100 if name.startswith("large") else 8)
    monkeypatch.setattr(page, "MAX_PICTURE", 1000)
    shown = written(run)
    assert "pictures/large%20%231.png" in {link["href"] for link in shown.all("a")}
    assert len(shown.all("img")) == 2
    monkeypatch.setattr(page, "MAX_PICTURES", 400)  # of the small ones, the page has room for the first
    assert len(written(run).all("img")) == 1


def test_a_page_contains_only_pictures_of_its_run(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run")
    save_picture(tmp_path / "secret.png")
    (run / "pictures" / "leak.png").symlink_to(tmp_path / "secret.png")
    (run / "pictures" / "loop.png").symlink_to("loop.png")
    (run / "pictures" / "folder.png").mkdir()
    os.mkfifo(run / "pictures" / "pipe.png")
    assert len(written(run).all("img")) == 1


def test_a_disk_that_is_full_is_an_error_and_leaves_the_old_page(tmp_path: Path, monkeypatch) -> None:
    run = save_run(tmp_path / "run")
    before = run_page.write(run).read_text()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FewtokensError, match=r"Cannot write .*report\.html: No space left"):
        run_page.write(run)
    assert (run / "report.html").read_text() == before
    assert [path.name for path in run.iterdir() if path.name.endswith(".part")] == []


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0 s"), (61.0, "1 min 1 s"), (7260.0, "2 h 1 min")])
def test_durations(seconds: float, words: str) -> None:
    assert run_page.duration(seconds) == words
