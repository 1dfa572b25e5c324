"""All variants of the benchmark read the same frames, and its results are written to a file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import videos
from fewtokens.benchmarks import video_input
from fewtokens.data.video import decoders
from fewtokens.data.video.container import video_info
from fewtokens.data.video.sampling import Plan


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "clips").mkdir()
    for index, (name, count) in enumerate([("a.mp4", 30), ("b.mkv", 20), ("short.mp4", 5)]):
        videos.write(tmp_path / "clips" / name, count, first=index, options={"x264-params": "keyint=10:bframes=2"})
    (tmp_path / "clips" / "bad.mp4").write_bytes(b"no video")
    return tmp_path / "clips"


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_the_reference_reads_the_same_frames_as_the_reader(decoder: str, folder: Path) -> None:
    if decoder == "decord":
        pytest.importorskip("decord")
    path = str(folder / "a.mp4")
    for indices in ([12, 14, 16], [0, 29]):
        frames = video_input.read_reference(
            decoder, path, Plan([np.array(indices)], 24, [(0, 0)], 24), video_info(path)
        )
        assert frames.shape == (len(indices), 24, 32, 3)
        assert np.array_equal(frames, decoders.read(path, indices, decoder, short_side=24).transpose(0, 2, 3, 1))


def test_a_decoder_is_measured_on_suitable_files(folder: Path, tmp_path: Path, capsys) -> None:
    threads = torch.get_num_threads()
    arguments = [str(folder), "--prepare", "--frames", "4", "--short-side", "24", "--rounds", "1", "--draws", "1"]
    arguments += ["--decoders", "pyav"]
    try:
        assert video_input.main([*arguments, "--write", str(tmp_path / "out.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    said, found = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert "bad.mp4 is skipped: Invalid data" in said
    assert "short.mp4 is skipped: 5 frames" in said
    assert list(found["files"]) == ["a.mp4", "b.mkv"]
    assert str(tmp_path) not in (tmp_path / "out.json").read_text()
    assert list(found["decoders"]) == ["pyav"]
    assert len(found["pyav"]["clips_per_s"]) == 8
    assert all(len(rates) == 1 and rates[0] > 0 for rates in found["pyav"]["clips_per_s"].values())
    assert found["pyav"]["medians"]["reference"]["relative_to_reference"] == 1


def test_a_single_file_is_an_error(folder: Path, capsys) -> None:
    assert video_input.main([str(folder / "a.mp4"), "--frames", "4"]) == 1
    assert "needs at least two suitable files, got 1" in capsys.readouterr().err
