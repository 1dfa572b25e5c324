"""moving_digits: what is written, once and whole, and what is refused."""

import multiprocessing
import os
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from fewtokens.data import seeding
from fewtokens.data.image.digits import Digits
from fewtokens.data.video import container, motion, moving_digits
from fewtokens.data.video import decoders as decoding
from fewtokens.data.video.motion import MOTIONS
from fewtokens.data.video.moving_digits import Recipe, written
from fewtokens.errors import FewtokensError

NAMES = list(MOTIONS)
SMALL = Recipe(video_frames=5, copies=2)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first twelve digits of every part only."""
    read = Digits.read
    first = torch.arange(12)
    monkeypatch.setattr(Digits, "read", lambda self: {part: all_.take(first) for part, all_ in read(self).items()})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_part_has_its_digits_and_all_classes_alike(all_videos: Path) -> None:
    folder = all_videos / Recipe(video_frames=8, copies=1).folder
    for part, digits in {"train": 1297, "val": 200, "test": 300}.items():
        assert sorted(path.name for path in (folder / part).iterdir()) == NAMES
        counts = [len(list((folder / part / name).glob("*.mp4"))) for name in NAMES]
        assert sum(counts) == digits
        assert max(counts) - min(counts) <= 1
    assert len(contents(folder)) == 1797 + 1
    assert sum(len(content) for content in contents(folder).values()) < 15e6


def test_every_decoder_reads_what_was_drawn(decoder: str, few: None, tmp_path: Path) -> None:
    folder = written(tmp_path, SMALL)
    digits = Digits(num_classes=10, image_size=8, channels=1, batch_size=1).read()["test"].images[:, 0]
    draws = seeding.generator(seeding.SPLIT, 1, 2, 2)
    labels = (torch.arange(24) % 8)[torch.randperm(24, generator=draws)]
    drawn = motion.draw(digits.repeat_interleave(2, dim=0), motion.phases(labels, 5, draws))
    for index, (label, frames) in enumerate(zip(labels.tolist(), drawn, strict=True)):
        path = str(folder / "test" / NAMES[label] / f"{index:05d}.mp4")
        found = container.facts(path)
        assert (found.frames, found.width, found.height, found.access) == (5, 32, 32, "any")
        read = decoding.read(path, range(5), decoder)
        assert np.abs(read.astype(int) - frames[:, None].numpy()).max() <= 1  # Y has 219 steps


def test_a_frame_is_coded_without_regard_to_its_neighbours(tmp_path: Path) -> None:
    draws = seeding.generator(2)
    digits = torch.randint(0, 256, (8, 8, 8), dtype=torch.uint8, generator=draws)
    videos = motion.draw(digits, motion.phases(torch.arange(8), 6, draws))
    still = videos[:, 4:5].expand(-1, 6, -1, -1)
    for index in range(8):
        moving_digits.encode(tmp_path / "moving.mp4", videos[index])
        moving_digits.encode(tmp_path / "still.mp4", still[index])
        moved, stood = (decoding.read(str(tmp_path / name), [4]) for name in ("moving.mp4", "still.mp4"))
        assert np.array_equal(moved, stood)


def test_the_same_videos_are_written_every_time(few: None, tmp_path: Path) -> None:
    once, again = (written(tmp_path / name, SMALL) for name in ("a", "b"))
    assert contents(once).keys() == contents(again).keys()
    assert len(contents(once)) == 3 * 24 + 1
    for name in contents(once):  # x264 was seen to code the same frames otherwise now and then
        if name.endswith(".mp4"):
            first, second = (decoding.read(str(folder / name), range(5)) for folder in (once, again))
            assert np.array_equal(first, second)
    assert written(tmp_path / "a", Recipe(video_frames=5, copies=1)) != once


def test_a_folder_is_written_once(few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path / "new" / "root", SMALL)
    assert list(folder.parent.iterdir()) == [folder]
    assert folder.stat().st_mode & 0o777 == 0o755
    monkeypatch.setattr(moving_digits, "encode", lambda path, video: pytest.fail("written twice"))
    assert written(tmp_path / "new" / "root", SMALL) == folder


def test_an_error_leaves_nothing(few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, done = moving_digits.encode, list[Path]()

    def stops(path: Path, video: torch.Tensor) -> None:
        encode(path, video)
        done.append(path)
        if len(done) == 30:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(moving_digits, "encode", stops)
        written(tmp_path, SMALL)
    assert len(done) == 30
    assert not list(tmp_path.iterdir())
    assert len(contents(written(tmp_path, SMALL))) == 3 * 24 + 1


def test_a_killed_process_leaves_no_half_of_it(few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, fork = moving_digits.encode, multiprocessing.get_context("fork")
    begun = fork.Event()

    def write() -> None:
        torch.set_num_threads(1)  # threads do not come along into a fork
        written(tmp_path, SMALL)

    def hangs(path: Path, video: torch.Tensor) -> None:
        encode(path, video)
        begun.set()
        signal.pause()

    with monkeypatch.context() as patched:
        patched.setattr(moving_digits, "encode", hangs)
        process = fork.Process(target=write, daemon=True)
        process.start()
    assert begun.wait(30)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert not (tmp_path / SMALL.folder).exists()
    assert len(contents(written(tmp_path, SMALL))) == 3 * 24 + 1


def test_two_at_once_end_with_one_folder(few: None, tmp_path: Path) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(written(tmp_path, SMALL))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / SMALL.folder] * 2
    assert list(tmp_path.iterdir()) == [tmp_path / SMALL.folder]
    assert len(contents(found[0])) == 3 * 24 + 1


@pytest.mark.parametrize("change", ["one video less", "one more", "another size", "no class", "no stamp", "no json"])
def test_a_folder_that_changed_is_refused(change: str, few: None, tmp_path: Path) -> None:
    folder = written(tmp_path, SMALL)
    video, stamp = next((folder / "val" / "up").iterdir()), folder / "moving_digits.json"
    if change == "one video less":
        video.unlink()
    elif change == "one more":
        shutil.copy(video, video.with_name("more.mp4"))
    elif change == "another size":
        video.write_bytes(video.read_bytes() + b"\0")
    elif change == "no class":
        shutil.rmtree(folder / "train" / "left")
    elif change == "no stamp":
        stamp.unlink()
    else:
        stamp.write_text("[")
    with pytest.raises(FewtokensError, match=r"used as they were written.*delete this folder, and it is written anew"):
        written(tmp_path, SMALL)
    shutil.rmtree(folder)
    assert written(tmp_path, SMALL) == folder


def test_what_cannot_be_written_says_so(few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched, pytest.raises(FewtokensError, match=r"libnone.*pip install av=="):
        patched.setattr(moving_digits, "_CODEC", "libnone")  # as a PyAV without x264
        written(tmp_path / "new", SMALL)
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(FewtokensError, match=r"written once.*set data\.root to another folder"):
        written(tmp_path / "file", SMALL)
    with pytest.raises(FewtokensError, match=r"data\.copies is out of range"):
        Recipe(copies=0)
