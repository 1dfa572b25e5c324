"""moving_digits: only the motion tells the classes apart; the folder is written once, completely or not at all."""

import multiprocessing
import os
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from sklearn.datasets import load_digits
from torch import Tensor

from fewtokens.data import seeding
from fewtokens.data.image.digits import Digits
from fewtokens.data.video import container, decoders, moving_digits
from fewtokens.data.video.moving_digits import MOTIONS, SIDE, Recipe, render, sample_phases, write_once
from fewtokens.errors import FewtokensError

NAMES = list(MOTIONS)
SMALL = Recipe(video_frames=5, copies=2)


def spot(row: int, column: int) -> Tensor:
    """Return an 8 x 8 picture with a single bright pixel."""
    pictures = torch.zeros(1, 8, 8, dtype=torch.uint8)
    pictures[0, row, column] = 255
    return pictures


def center(frames: Tensor, axis: int) -> Tensor:
    """Return the center of the light of each frame along an axis, in periods of the torus."""
    light = frames.double().sum(dim=1 if axis else 2)
    waves = torch.polar(light, (torch.arange(SIDE).double() + 0.5) / SIDE * 2 * torch.pi)
    return (waves.sum(dim=1).angle() / (2 * torch.pi)) % 1


def phases_of(name: str) -> Tensor:
    return sample_phases(torch.tensor([NAMES.index(name)]), 16, torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "axis", "sign"), [("left", 1, -1), ("right", 1, 1), ("up", 0, -1), ("down", 0, 1)])
def test_digits_move_in_the_direction_of_their_class(name: str, axis: int, sign: int) -> None:
    frames = render(spot(3, 4), phases_of(name))[0]
    steps = (center(frames, axis).diff() * sign) % 1
    assert ((steps > 0.045) & (steps < 0.105)).all()
    assert (center(frames, 1 - axis).diff().abs() < 0.01).all()


@pytest.mark.parametrize(("name", "sign"), [("clockwise", 1), ("counterclockwise", -1)])
def test_digits_turn_in_the_direction_of_their_class(name: str, sign: int) -> None:
    phases = phases_of(name)
    phases[..., :2] = 0.5
    frames = render(spot(1, 4), phases)[0]  # above the center of rotation
    right, down = center(frames, 1) - 0.5, center(frames, 0) - 0.5
    turns = torch.atan2(down, right).diff() / (2 * torch.pi)  # rows increase downward: from right to down is clockwise
    assert (((turns * sign) % 1 > 0.04) & ((turns * sign) % 1 < 0.11)).all()


@pytest.mark.parametrize(("name", "sign"), [("grow", 1), ("shrink", -1)])
def test_digits_change_size_in_the_direction_of_their_class(name: str, sign: int) -> None:
    phases = phases_of(name)
    light = render(spot(3, 4), phases)[0].double().sum(dim=(1, 2))
    changes = light.diff() * sign
    wraps = (phases[0, :, 3].diff() * sign < 0).tolist()  # from the largest size to the smallest, or back
    assert 0 < sum(wraps) < 3
    assert all((change < 0) == wrap for change, wrap in zip(changes.tolist(), wraps, strict=True))


@pytest.mark.parametrize("frame", [0, 7, 15])
def test_a_frame_has_the_same_distribution_in_every_class(frame: int) -> None:
    labels = torch.arange(len(NAMES)).repeat_interleave(1000)
    phases = sample_phases(labels, 16, seeding.generator(0))[:, frame]
    for label in range(len(NAMES)):
        drawn = phases[labels == label]
        assert all(kstest(drawn[:, phase].numpy(), "uniform").pvalue > 1e-3 for phase in range(4))
        # They are independent, too: within 4 standard errors, for the phases and, since these are periodic, for waves.
        for values in (drawn, (drawn * 2 * torch.pi).cos(), (drawn * 2 * torch.pi).sin()):
            assert (torch.corrcoef(values.T) - torch.eye(4)).abs().max() < 4 / 1000**0.5


def test_rendered_frames_of_all_classes_look_alike() -> None:
    digits = torch.from_numpy(load_digits().images * (255 / 16)).to(torch.uint8)
    labels = torch.arange(len(NAMES)).repeat(800 // len(NAMES))
    frames = render(digits[:800], sample_phases(labels, 9, seeding.generator(1)))[:, 8].double() / 255
    overall = frames.mean(dim=0)
    for label in range(len(NAMES)):
        errors = frames.std(dim=0) / (labels == label).sum() ** 0.5
        assert ((frames[labels == label].mean(dim=0) - overall) / errors).abs().max() < 5  # of 1024 pixels


def test_rendering_is_the_same_everywhere_on_the_torus() -> None:
    phases = torch.tensor([[0.25, 0.25, 0.3, 0.4], [0.25 + 9 / 32, 0.25 + 23 / 32, 0.3, 0.4]], dtype=torch.float64)
    first, second = render(spot(2, 5), phases[None])[0]
    assert torch.equal(first.roll((23, 9), (0, 1)), second)
    assert first.float().std() > 1


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restrict every part to its first twelve digits."""
    read = Digits.read
    first = torch.arange(12)
    monkeypatch.setattr(Digits, "read", lambda self: {part: all_.take(first) for part, all_ in read(self).items()})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_part_has_its_digits_and_balanced_classes(all_videos: Path) -> None:
    folder = all_videos / Recipe(video_frames=8, copies=1).folder
    for part, digits in {"train": 1297, "val": 200, "test": 300}.items():
        assert sorted(path.name for path in (folder / part).iterdir()) == NAMES
        counts = [len(list((folder / part / name).glob("*.mp4"))) for name in NAMES]
        assert sum(counts) == digits
        assert max(counts) - min(counts) <= 1
    assert len(contents(folder)) == 1797 + 1
    assert sum(len(content) for content in contents(folder).values()) < 15e6


def test_every_decoder_reads_what_was_rendered(decoder: str, few: None, tmp_path: Path) -> None:
    folder = write_once(tmp_path, SMALL)
    digits = Digits(num_classes=10, image_size=8, channels=1, batch_size=1).read()["test"].images[:, 0]
    generator = seeding.generator(seeding.SPLIT, 1, 2, 2)
    labels = (torch.arange(24) % 8)[torch.randperm(24, generator=generator)]
    rendered = render(digits.repeat_interleave(2, dim=0), sample_phases(labels, 5, generator))
    for index, (label, frames) in enumerate(zip(labels.tolist(), rendered, strict=True)):
        path = str(folder / "test" / NAMES[label] / f"{index:05d}.mp4")
        found = container.video_info(path)
        assert (found.frames, found.width, found.height, found.access) == (5, 32, 32, "any")
        read = decoders.read(path, range(5), decoder)
        assert np.abs(read.astype(int) - frames[:, None].numpy()).max() <= 1  # Y has 219 steps


def test_an_encoded_frame_does_not_depend_on_its_neighbors(tmp_path: Path) -> None:
    generator = seeding.generator(2)
    digits = torch.randint(0, 256, (8, 8, 8), dtype=torch.uint8, generator=generator)
    videos = render(digits, sample_phases(torch.arange(8), 6, generator))
    still = videos[:, 4:5].expand(-1, 6, -1, -1)
    for index in range(8):
        moving_digits.encode(tmp_path / "moving.mp4", videos[index])
        moving_digits.encode(tmp_path / "still.mp4", still[index])
        moved, stood = (decoders.read(str(tmp_path / name), [4]) for name in ("moving.mp4", "still.mp4"))
        assert np.array_equal(moved, stood)


def test_the_same_videos_are_written_every_time(few: None, tmp_path: Path) -> None:
    once, again = (write_once(tmp_path / name, SMALL) for name in ("a", "b"))
    assert contents(once).keys() == contents(again).keys()
    assert len(contents(once)) == 3 * 24 + 1
    for name in contents(once):  # the bytes may differ: x264 rarely encodes the same frames in another way
        if name.endswith(".mp4"):
            first, second = (decoders.read(str(folder / name), range(5)) for folder in (once, again))
            assert np.array_equal(first, second)
    assert write_once(tmp_path / "a", Recipe(video_frames=5, copies=1)) != once


def test_a_folder_is_written_once(few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_once(tmp_path / "new" / "root", SMALL)
    assert list(folder.parent.iterdir()) == [folder]
    assert folder.stat().st_mode & 0o777 == 0o755
    monkeypatch.setattr(moving_digits, "encode", lambda path, video: pytest.fail("written twice"))
    assert write_once(tmp_path / "new" / "root", SMALL) == folder


def test_an_error_leaves_nothing(few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, done = moving_digits.encode, list[Path]()

    def stops(path: Path, video: torch.Tensor) -> None:
        encode(path, video)
        done.append(path)
        if len(done) == 30:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(moving_digits, "encode", stops)
        write_once(tmp_path, SMALL)
    assert len(done) == 30
    assert not list(tmp_path.iterdir())
    assert len(contents(write_once(tmp_path, SMALL))) == 3 * 24 + 1


def test_a_killed_process_leaves_no_incomplete_folder(
    few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, fork = moving_digits.encode, multiprocessing.get_context("fork")
    begun = fork.Event()

    def write() -> None:
        torch.set_num_threads(1)  # the threads of the parent do not exist in a fork
        write_once(tmp_path, SMALL)

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
    assert len(contents(write_once(tmp_path, SMALL))) == 3 * 24 + 1


def test_two_writers_end_with_one_folder(few: None, tmp_path: Path) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(write_once(tmp_path, SMALL))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / SMALL.folder] * 2
    assert list(tmp_path.iterdir()) == [tmp_path / SMALL.folder]
    assert len(contents(found[0])) == 3 * 24 + 1


@pytest.mark.parametrize("change", ["one video less", "one more", "another size", "no class", "no stamp", "no json"])
def test_a_changed_folder_is_an_error(change: str, few: None, tmp_path: Path) -> None:
    folder = write_once(tmp_path, SMALL)
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
    match = r"videos in .* differ from those that moving_digits\.json describes.*Delete this folder to have it written"
    with pytest.raises(FewtokensError, match=match):
        write_once(tmp_path, SMALL)
    shutil.rmtree(folder)
    assert write_once(tmp_path, SMALL) == folder


def test_an_unwritable_folder_or_missing_codec_is_an_error(
    few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched, pytest.raises(FewtokensError, match=r"libnone.*pip install av=="):
        patched.setattr(moving_digits, "_CODEC", "libnone")  # like a PyAV without x264
        write_once(tmp_path / "new", SMALL)
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "file").touch()
    match = r"Cannot write the moving_digits videos .*/file: .*Set `data\.root` to a writable folder"
    with pytest.raises(FewtokensError, match=match):
        write_once(tmp_path / "file", SMALL)
    with pytest.raises(FewtokensError, match=r"`data\.copies` must be an int >= 1, got 0"):
        Recipe(copies=0)
