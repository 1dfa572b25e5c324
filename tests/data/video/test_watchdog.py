"""A process that hangs with the interpreter's lock held, crashes or prints costs at most its time limit."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import videos
from fewtokens.data.video.reader import Reader
from fewtokens.data.video.records import UnreadableError
from fewtokens.data.video.watchdog import CallAborted, WatchedProcess
from fewtokens.errors import FewtokensError


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[WatchedProcess]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    found = WatchedProcess("stuck", 20.0)
    yield found
    found.close()


def running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{process}/stat").read_text().split()[2]


def test_arrays_come_in_shared_memory_of_any_size(watched: WatchedProcess) -> None:
    first = watched.call("fill", size=1000)
    for size in (1000, 10, 3_000_000, 2_000_000):
        assert watched.call("fill", size=size) == first != os.getpid()
        assert np.array_equal(watched.memory((size // 10, 10)).ravel(), np.arange(size) % 251)


def test_a_call_that_never_ends_times_out(watched: WatchedProcess) -> None:
    before = watched.call("fill", size=1)
    watched.limit = 0.3
    start = time.monotonic()
    with pytest.raises(CallAborted, match=r"timed out after 0\.3 s"):
        watched.call("spin")
    assert time.monotonic() - start < 5
    assert not running(before)
    watched.limit = 20.0
    assert watched.call("fill", size=1) != before


def test_the_timer_is_for_one_call(watched: WatchedProcess) -> None:
    watched.limit = 1.0
    before = watched.call("fill", size=1)
    for _ in range(3):
        watched.call("sleep", seconds=0.4)
    time.sleep(0.7)
    assert watched.call("fill", size=1) == before


def test_signals_that_stop_a_run_do_not_end_a_call(watched: WatchedProcess) -> None:
    before = watched.call("fill", size=1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        os.kill(before, number)
    assert watched.call("fill", size=1) == before


@pytest.mark.parametrize(("name", "match"), [("crash", "SIGSEGV"), ("leave", "exit code 3"), ("bug", "exit code 1")])
def test_a_crash_is_told_and_the_next_call_works(watched: WatchedProcess, name: str, match: str) -> None:
    with pytest.raises(CallAborted, match=match):
        watched.call(name)
    assert watched.call("chatter") == "quiet"


def test_chatter_goes_nowhere_and_errors_come_as_they_were_raised(watched: WatchedProcess, capfd) -> None:
    assert watched.call("chatter") == "quiet"
    with pytest.raises(FewtokensError) as caught:
        watched.call("refuse")
    assert str(caught.value) == "The rule is broken. Repair it."
    assert capfd.readouterr() == ("", "")


def test_an_interrupted_call_leaves_no_answer_for_the_next(watched: WatchedProcess) -> None:
    watched.call("fill", size=1)
    threading.Timer(0.3, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        watched.call("sleep", seconds=5)
    assert watched.call("chatter") == "quiet"


def test_forked_and_pickled_copies_have_processes_of_their_own(watched: WatchedProcess) -> None:
    mine = watched.call("fill", size=5)
    copy = pickle.loads(pickle.dumps(watched))
    assert copy.call("fill", size=5) != mine
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.write(write, str(watched.call("fill", size=5)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert int(os.read(read, 100)) not in (mine, 0)
    assert watched.call("fill", size=5) == mine
    copy.close()


def test_the_process_ends_with_its_owner(tmp_path: Path) -> None:
    code = (
        "import os, signal; from fewtokens.data.video.watchdog import WatchedProcess;"
        "w = WatchedProcess('stuck', 30.0);"
        "print(w.call('fill', size=1), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parents[3] / "src")])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, check=False
    )
    process = int(done.stdout)
    for _ in range(100):
        if not running(process):
            return
        time.sleep(0.05)
    raise AssertionError("it still runs")


def test_a_module_that_does_not_load_is_told(capfd) -> None:
    with pytest.raises(FewtokensError, match="ended when it started"):
        WatchedProcess("no_such_module", 5.0).call("x")
    assert "No module named 'no_such_module'" in capfd.readouterr().err


def test_files_in_the_working_directory_are_no_modules(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit('taken for numpy')")
    path = videos.write(tmp_path / "a.mp4", count=3)
    monkeypatch.chdir(tmp_path)
    assert Reader("pyav").video_info(str(path)).frames == 3


def test_a_reader_gives_what_the_decoder_gives(tmp_path: Path) -> None:
    path = str(videos.write(tmp_path / "a.mp4", rate=10))
    reader = Reader("pyav")
    found = reader.video_info(path)
    assert reader.frame_range(path, 1.0, 2.0) == (10, 10)
    for info in (None, found):
        frames = reader.read(path, [3, 9, 3], info=info)
        assert [videos.number(frame) for frame in frames] == [3, 9, 3]
        assert reader.read(path, [0], 24, info).shape == (1, 3, 24, 32)
    assert [videos.number(frame) for frame in reader.read(path, range(30))] == list(range(30))
    with pytest.raises(FewtokensError, match="must be from 0 to 29"):
        reader.read(path, [30])


def test_a_reader_names_bad_files_slow_ones_and_those_that_crash_the_decoder(tmp_path: Path) -> None:
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"x" * 100)
    good = str(videos.write(tmp_path / "a.mp4"))
    reader = Reader("pyav")
    with pytest.raises(UnreadableError, match=f"{bad}: Invalid data"):
        reader.video_info(str(bad))
    reader.video_info(good)
    os.kill(reader.process._process.pid, signal.SIGSEGV)
    with pytest.raises(UnreadableError, match=r"crashed \(SIGSEGV\)"):
        reader.read(good, [0])
    reader.process.limit = 0.001
    with pytest.raises(UnreadableError, match=r"timed out after 0\.001 s"):
        reader.read(str(videos.write(tmp_path / "long.mp4", size=(640, 480), count=100)), range(100))
    reader.process.limit = 20.0
    assert reader.read(good, [0]).shape == (1, 3, 48, 64)


def test_a_killed_process_is_no_bad_file_unless_it_is_killed_twice(tmp_path: Path, caplog) -> None:
    path = str(videos.write(tmp_path / "a.mp4"))
    reader = Reader("pyav")
    reader.video_info(path)
    os.kill(reader.process._process.pid, signal.SIGKILL)
    assert [videos.number(frame) for frame in reader.read(path, [3, 9])] == [3, 9]
    assert f"{path}: the decoder process was killed (SIGKILL)" in caplog.text


def test_only_killed_calls_are_repeated_and_only_once(watched: WatchedProcess, monkeypatch) -> None:
    reader, starts, start = Reader("pyav"), list[None](), watched._start
    reader.process = watched
    monkeypatch.setattr(watched, "_start", lambda: (starts.append(None), start()))
    with pytest.raises(UnreadableError, match="memory ran out"):
        reader._call("killed", "a.mp4")
    assert len(starts) == 2
    watched.limit = 0.3
    with pytest.raises(UnreadableError, match=r"timed out after 0\.3 s"):
        reader._call("hang", "a.mp4")
    assert len(starts) == 3


def test_the_process_is_lean(tmp_path: Path) -> None:
    reader = Reader("pyav")
    reader.read(str(videos.write(tmp_path / "a.mp4")), [0])
    maps = Path(f"/proc/{reader.process._process.pid}/maps")
    if not maps.exists():
        pytest.skip("no /proc here")
    assert "libtorch" not in maps.read_text()


@pytest.mark.parametrize(
    ("arguments", "match"), [(("opencv",), "'decord' or 'torchcodec'"), (("pyav", 0.0), "> 0, got 0.0")]
)
def test_settings_that_cannot_be(arguments: tuple, match: str) -> None:
    with pytest.raises(FewtokensError, match=match):
        Reader(*arguments)
