"""CIFAR-10: both sources, the cache, the splits, and what is refused."""

import hashlib
import http.server
import io
import os
import pickle
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewtokens.data.image import archive, cifar10, folders
from fewtokens.data.image.cifar10 import Cifar10
from fewtokens.errors import FewtokensError

RNG = np.random.default_rng(0)
LABELS = np.arange(40, dtype=np.uint8) % 10
PIXELS = RNG.integers(0, 256, (6, 40, 3072), dtype=np.uint8)


def data(root: Path, **changes: Any) -> Cifar10:
    settings = {"num_classes": 3, "image_size": 32, "batch_size": 4, "val_images": 6} | changes
    return Cifar10(root, **settings)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write(path: Path, kind: archive.Archive, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive of 200 + 40 images, with members that must never be touched; its checksum becomes the right one."""
    with tarfile.open(path / kind.name, "w:gz") as tar:
        link = tarfile.TarInfo(kind.train[0])  # a link under the name of a member, before the member
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        add(tar, "../../evil", b"x")
        for name, pixels in zip(kind.train + kind.test, PIXELS, strict=True):
            if kind is archive.BINARY:
                add(tar, name, np.concatenate([LABELS[:, None], pixels], 1).tobytes())
            else:
                add(tar, name, pickle.dumps({b"data": pixels, b"labels": LABELS.tolist()}, protocol=2))
    found = replace(kind, md5=hashlib.md5((path / kind.name).read_bytes()).hexdigest())
    monkeypatch.setattr(archive, "BINARY" if kind is archive.BINARY else "PYTHON", found)
    return path


@pytest.mark.parametrize("kind", [archive.BINARY, archive.PYTHON], ids=["binary", "python"])
def test_archives_are_read_in_their_order(kind: archive.Archive, tmp_path: Path, monkeypatch) -> None:
    root = write(tmp_path, kind, monkeypatch)
    found = data(root, num_classes=10, val_images=50, split="tail")
    found.setup()
    train, val, test = (found.dataset(part).samples for part in ("train", "val", "test"))
    pixels = torch.from_numpy(PIXELS).view(-1, 3, 32, 32)
    assert torch.equal(train.images, pixels[:150])
    assert torch.equal(val.images, pixels[150:200])
    assert torch.equal(test.images, pixels[200:])
    assert test.targets.tolist() == LABELS.tolist()
    assert found.description == "CIFAR-10 (official archive)"
    assert sorted(p.name for p in root.iterdir()) == [".fewtokens-cache.safetensors", kind.name]


def test_an_archive_with_another_checksum_is_not_opened(tmp_path: Path, monkeypatch) -> None:
    root = write(tmp_path, archive.BINARY, monkeypatch)
    with (root / archive.BINARY.name).open("ab") as file:
        file.write(b"more")
    with pytest.raises(FewtokensError, match="md5"):
        data(root, num_classes=10).setup()


def test_pickles_build_arrays_and_nothing_else() -> None:
    with pytest.raises(pickle.UnpicklingError, match="no place in CIFAR-10"):
        archive.read_python(pickle.dumps({b"data": os.getcwd}))


class _Site(http.server.BaseHTTPRequestHandler):
    content = b""
    ranges: tuple[str | None, ...] = ()

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        type(self).ranges += (asked,)
        start = int(asked[6:-1]) if asked else 0
        if start >= len(self.content):
            self.send_error(416)
            return
        self.send_response(206 if asked else 200)
        self.end_headers()
        self.wfile.write(self.content[start:])

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def site() -> Iterator[str]:
    server = http.server.HTTPServer(("127.0.0.1", 0), _Site)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    _Site.content, _Site.ranges = bytes(range(256)) * 100, ()
    yield f"http://127.0.0.1:{server.server_port}/file"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("begun", "asked"), [(0, None), (1000, "bytes=1000-"), (25600, "bytes=25600-")])
def test_download_goes_on_where_it_stopped(site: str, tmp_path: Path, begun: int, asked: str | None) -> None:
    wanted = replace(archive.BINARY, md5=hashlib.md5(_Site.content).hexdigest())
    if begun:
        (tmp_path / f"{wanted.name}.part").write_bytes(_Site.content[:begun])
    assert archive.download(wanted, tmp_path, site).read_bytes() == _Site.content
    assert _Site.ranges == (asked,)
    assert [p.name for p in tmp_path.iterdir()] == [wanted.name]


def test_a_wrong_download_is_thrown_away(site: str, tmp_path: Path) -> None:
    with pytest.raises(FewtokensError, match="published file"):
        archive.download(archive.BINARY, tmp_path, site)
    assert not list(tmp_path.iterdir())


def test_without_network_the_error_says_where_the_file_goes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(archive, "_SITE", "http://127.0.0.1:9/")
    with pytest.raises(FewtokensError, match=f"put cifar-10-binary.tar.gz into {tmp_path} by hand"):
        data(tmp_path, download=True).prepare_data()


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_class_folders(make_folders, suffix: str) -> None:
    root = make_folders(suffix=suffix)
    found = data(root)
    found.setup()
    train, val, test = (found.dataset(part).samples for part in ("train", "val", "test"))
    assert [torch.bincount(s.targets).tolist() for s in (train, val, test)] == [[6] * 3, [2] * 3, [8] * 3]
    assert torch.equal(test.images[9], folders.read_tensor(root / "test" / "b" / f"0001.{suffix}"))
    assert found.description == f"CIFAR-10 (class folders at {root})"


def test_the_split_depends_on_its_own_seed_alone(make_folders) -> None:
    root = make_folders()
    parts = []
    for seed, split_seed in ((0, 0), (1, 0), (0, 1)):
        found = data(root, seed=seed, split_seed=split_seed)
        found.setup()
        parts.append(found.dataset("val").samples.images)
    assert torch.equal(parts[0], parts[1])
    assert not torch.equal(parts[0], parts[2])


def test_everything_can_be_trained_on(make_folders) -> None:
    found = data(make_folders(), val_images=0)
    found.setup()
    assert found.val_dataloader() == []
    assert len(found.dataset("train")) == 24


def test_the_second_start_reads_the_cache_and_changes_rebuild_it(make_folders, monkeypatch) -> None:
    root, decoded = make_folders(), []
    decode = folders.decode_all
    monkeypatch.setattr(folders, "decode_all", lambda found: decoded.append(1) or decode(found))
    cache = root / cifar10._CACHE

    def images() -> torch.Tensor:
        found = data(root)
        found.setup()
        return found.dataset("train").samples.images.clone()

    first = images()
    assert len(decoded) == 2
    assert torch.equal(images(), first)
    assert len(decoded) == 2
    whole = cache.read_bytes()
    for broken in (whole[:-100], whole[:20], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        decoded.clear()
        cache.write_bytes(broken)
        assert torch.equal(images(), first)
        assert torch.equal(images(), first)
        assert len(decoded) == 2
    (root / "train" / "a" / "0000.png").rename(root / "train" / "a" / "9999.png")
    assert not torch.equal(images(), first)
    assert sorted(p.name for p in root.iterdir()) == [cifar10._CACHE, "test", "train"]


def test_a_folder_that_cannot_be_written_to_costs_a_warning(make_folders, monkeypatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("fewtokens.data.image.cache.save_file", refuse)
    root = make_folders()
    with pytest.warns(UserWarning, match="No cache was written"):
        data(root).setup()
    assert sorted(p.name for p in root.iterdir()) == ["test", "train"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"val_images": 24}, "0 .none. to 23"),
        ({"val_images": -1}, "held out"),
        ({"split": "random"}, "stratified or tail"),
        ({"split": "tail"}, "order of the official archive"),
        ({"num_classes": 10}, "Expected: 10 folders. Found: 3 folders"),
        ({"image_size": 48}, "32 x 32 pixels. To do: set data.image_size=32"),
        ({"channels": 1, "mean": [0.5], "std": [0.5]}, "data.channels"),
        ({"mean": [0.5, 0.5]}, "one number per channel"),
        ({"batch_size": 0}, "data.batch_size"),
        ({"num_workers": -1}, "data.num_workers"),
        ({"frames": 4}, "data.frames"),
    ],
)
def test_settings_that_do_not_fit_are_refused(make_folders, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(FewtokensError, match=match):
        data(make_folders(), **changes).setup()


def test_missing_data_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(FewtokensError, match=r"no folder .*data.download=true.*cifar-10-binary.tar.gz"):
        data(tmp_path / "absent").setup()
    with pytest.raises(FewtokensError, match=r"neither in .*train/<class>"):
        data(tmp_path).setup()


def test_bad_files_are_named(make_folders) -> None:
    root = make_folders()
    (root / "test" / "c" / "0003.png").write_bytes(b"no picture")
    with pytest.raises(FewtokensError, match=r"test/c/0003\.png"):
        data(root).setup()


def test_pictures_of_another_size_are_named(make_folders) -> None:
    root = make_folders()
    picture = folders.read_pil(root / "test" / "c" / "0003.png").resize((40, 32))
    picture.save(root / "test" / "c" / "0003.png")
    with pytest.raises(FewtokensError, match=r"40 x 32 pixels in .*test/c/0003.png"):
        data(root).setup()


@pytest.mark.parametrize("name", ["d", "e"])
def test_empty_and_unmatched_class_folders_are_named(make_folders, name: str) -> None:
    root = make_folders()
    (root / "test" / name).mkdir()
    with pytest.raises(FewtokensError, match=f"none in .*test/{name}"):
        data(root).setup()
    (root / "test" / "a" / "0000.png").rename(root / "test" / name / "0000.png")
    with pytest.raises(FewtokensError, match=f"only in one of them: {name}"):
        data(root).setup()


@pytest.mark.skipif("FEWTOKENS_CIFAR10" not in os.environ, reason="FEWTOKENS_CIFAR10 names no folder with CIFAR-10")
def test_real_cifar10() -> None:
    found = data(Path(os.environ["FEWTOKENS_CIFAR10"]), num_classes=10, val_images=10_000)
    found.setup()
    assert [len(found.dataset(part)) for part in ("train", "val", "test")] == [40_000, 10_000, 10_000]
    mean = (found.dataset("train").samples.images[::10].float() / 255).mean((0, 2, 3))
    torch.testing.assert_close(mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=0.01, rtol=0)
