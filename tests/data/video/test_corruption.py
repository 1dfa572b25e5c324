"""Hundreds of damaged files: the reader neither crashes, hangs nor leaks, and all decoders agree on what they accept.

The source files are generated. FEWTOKENS_CLIPS can name a folder of real clips that are damaged as well.
"""

import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import videos
from fewtokens.data.video import decoders, records
from fewtokens.data.video.reader import Reader
from fewtokens.data.video.records import UnreadableError
from fewtokens.errors import FewtokensError

GROUPS = "bframes=2:keyint=12"
KINDS = ("truncated", "bits", "zeros", "noise", "doubled", "header", "suffix", "text", "sound", "empty")
HOPELESS = ("text", "sound", "empty")


class Damaged(NamedTuple):
    kind: str
    path: Path
    source: Path


def sources(folder: Path) -> list[Path]:
    folder.mkdir()
    made = [
        videos.write(folder / "a.mp4", 60, options={"x264-params": GROUPS}),
        videos.write(folder / "b.mkv", 60, options={"x264-params": GROUPS}),
        videos.write(folder / "c.webm", 40, codec="libvpx-vp9", options={"deadline": "realtime", "cpu-used": "8"}),
        videos.write(folder / "d.avi", 60, codec="mpeg4", options={"g": "12"}),
        videos.write(folder / "e.mp4", 40, codec="libx265", options={"x265-params": "log-level=none"}),
        videos.write(folder / "f.mov", 40, rotation=90, sound=True),
        videos.write(folder / "g.ts", 40),
    ]
    return [*made, videos.cut(made[0], folder / "h.mp4", 7)]


def damage(source: Path, kind: str, target: Path, rng: np.random.Generator) -> Damaged:
    content = bytearray(source.read_bytes())
    size = len(content)
    place = int(rng.integers(size))
    if kind == "truncated":
        del content[place:]
    elif kind == "bits":
        for index in rng.integers(size, size=int(rng.integers(1, 40))):
            content[index] ^= 1 << int(rng.integers(8))
    elif kind == "zeros":
        content[place : place + size // 10] = bytes(len(content[place : place + size // 10]))
    elif kind == "noise":
        content[place : place + size // 20] = rng.bytes(len(content[place : place + size // 20]))
    elif kind == "doubled":
        content[place:place] = content[place : place + size // 5]
    elif kind == "header":
        content[: min(size, 2048)] = rng.bytes(min(size, 2048))
    elif kind == "suffix":
        target = target.with_suffix(str(rng.choice([".avi", ".mkv", ".mp4", ".txt"])))
    elif kind == "text":
        content = bytearray(b"this was a video\n" * int(rng.integers(1, 200)))
    elif kind == "empty":
        content.clear()
    if kind == "sound":
        videos.write_sound(target.with_suffix(".mp4")).rename(target)
    else:
        target.write_bytes(content)
    return Damaged(kind, target, source)


def many(folder: Path, count: int, found: list[Path]) -> Iterator[Damaged]:
    rng = np.random.default_rng(0)
    for index in range(count):
        source, kind = found[index % len(found)], KINDS[index // len(found) % len(KINDS)]
        yield damage(source, kind, folder / f"{index}{source.suffix}", rng)


def readers() -> dict[str, Reader]:
    found = {}
    for name in records.DECODERS:
        try:
            records.require_decoder(name)
            if name != "pyav":
                decoders.load(name)
        except FewtokensError:
            continue
        found[name] = Reader(name, 20.0)
    return found


def attempt(reader: Reader, path: Path) -> np.ndarray | str:
    """Return all frames or the reason; first read some frames as training does, without decoding the whole file."""
    try:
        info = reader.video_info(str(path))
        reader.read(str(path), [info.frames // 2, 0], 24, info)
        return reader.read(str(path), range(info.frames), None, info).copy()
    except UnreadableError as error:
        return error.reason


def examine(bad: Damaged, by: dict[str, Reader]) -> str:
    """Read a file with all decoders and as `prepare` does, and return "read" or the reason."""
    try:
        by["pyav"].examine(str(bad.path), None, start=None, end=None, short_side=None, key_frames=12)
        verdict = "read"
    except UnreadableError as error:
        assert error.reason
        assert str(bad.path) in str(error)
        verdict = error.reason
    results = {name: attempt(reader, bad.path) for name, reader in by.items()}
    if verdict == "read":  # then every decoder must read it, and all the same frames
        for name, result in results.items():
            assert not isinstance(result, str), f"{bad} passed, but {name} says: {result}"
            assert np.array_equal(result, results["pyav"]), f"{bad} passed, but {name} reads other frames"
    if bad.kind == "truncated" and verdict == "read" and bad.path.suffix != ".ts":  # .ts announces no length
        assert len(results["pyav"]) == by["pyav"].video_info(str(bad.source)).frames, f"{bad} lacks frames and passed"
    if bad.kind in HOPELESS:
        assert verdict != "read", bad
    if bad.kind == "suffix":
        assert verdict == "read", bad
    return verdict


def survive(folder: Path, count: int, found: list[Path]) -> Counter[tuple[str, bool]]:
    by, seen = readers(), Counter[tuple[str, bool]]()
    processes = {}
    for bad in many(folder, count, found):
        start = time.monotonic()
        verdict = examine(bad, by)
        assert time.monotonic() - start < 60, f"{bad} takes too long"
        assert not verdict.startswith("timed out"), bad
        seen[bad.kind, verdict == "read"] += 1
        for name, reader in by.items():
            process = reader.process._process
            assert process is not None, f"{name} crashed over {bad}: {verdict}"
            assert processes.setdefault(name, process.pid) == process.pid, f"{name} crashed over {bad}"
    return seen


def test_some_damaged_files(tmp_path: Path) -> None:
    seen = survive(tmp_path, 160, sources(tmp_path / "sources"))
    assert sum(seen.values()) == 160
    assert seen["truncated", False] >= 12
    assert seen["header", False] >= 10


@pytest.mark.slow
def test_hundreds_of_damaged_files(tmp_path: Path) -> None:
    seen = survive(tmp_path, 640, sources(tmp_path / "sources"))
    assert sum(seen.values()) == 640
    print(sorted(seen.items()))


@pytest.mark.slow
@pytest.mark.skipif("FEWTOKENS_CLIPS" not in os.environ, reason="FEWTOKENS_CLIPS names no folder of real clips")
def test_hundreds_of_damaged_real_clips(tmp_path: Path) -> None:
    folder = Path(os.environ["FEWTOKENS_CLIPS"])
    by = readers()["pyav"]
    found = [path for path in sorted(folder.iterdir()) if not isinstance(attempt(by, path), str)]
    seen = survive(tmp_path, 520, found)
    assert sum(seen.values()) == 520
    print(sorted(seen.items()))


def memory(reader: Reader) -> float:
    """Return the private memory of the decoding process in MiB."""
    assert reader.process._process is not None
    fields = Path(f"/proc/{reader.process._process.pid}/status").read_text().split("\n")
    return sum(int(line.split()[1]) for line in fields if line.startswith("RssAnon")) / 1024


@pytest.mark.slow
@pytest.mark.parametrize("decoder", sorted(records.DECODERS))
def test_thousands_of_readings_leak_nothing(decoder: str, tmp_path: Path) -> None:
    found = readers()
    if decoder not in found or not Path("/proc/self/status").exists():
        pytest.skip(f"{decoder} is not installed, or no /proc here")
    reader = found[decoder]
    good = [str(path) for path in sources(tmp_path / "sources")]
    bad = [str(bad.path) for bad in many(tmp_path, 40, [Path(path) for path in good]) if bad.kind != "suffix"]
    for index in range(2000):
        path = (bad if index % 4 == 0 else good)[index // 4 % len(bad if index % 4 == 0 else good)]
        try:
            info = reader.video_info(path)
            reader.read(path, range(0, info.frames, 3), 40, info)
        except UnreadableError:
            pass
        if index == 400:
            before = memory(reader)
    assert memory(reader) - before < 20
