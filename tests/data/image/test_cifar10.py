"""CIFAR-10: its sources, the cache, the splits, and invalid settings."""

import functools
import hashlib
import http.server
import io
import os
import pickle
import socket
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from fewtokens.data.image import cifar10, folders
from fewtokens.data.image.cifar10 import Cifar10
from fewtokens.errors import FewtokensError

RNG = np.random.default_rng(0)
LABELS = np.arange(40, dtype=np.uint8) % 10
PIXELS = RNG.integers(0, 256, (6, 40, 3072), dtype=np.uint8)
ARCHIVE, EXTRACTED = "cifar-10-python.tar.gz", "cifar-10-batches-py"
MEMBERS = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def data(root: Path, **changes: Any) -> Cifar10:
    settings = {"num_classes": 3, "image_size": 32, "batch_size": 4, "val_images": 6} | changes
    return Cifar10(root, **settings)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive of 200 + 40 images in its root; torchvision is told the checksums of its files."""
    root = tmp_path / "cifar10"
    root.mkdir()
    files = {
        name: pickle.dumps({"data": pixels, "labels": LABELS.tolist()}, protocol=2)
        for name, pixels in zip(MEMBERS, PIXELS, strict=True)
    }
    files["batches.meta"] = pickle.dumps({"label_names": list("abcdefghij")})
    with tarfile.open(root / ARCHIVE, "w:gz") as tar:
        for name, content in files.items():
            add(tar, f"{EXTRACTED}/{name}", content)
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5((root / ARCHIVE).read_bytes()))
    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5(files[name])] for name in MEMBERS[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [[name, md5(files[name])] for name in MEMBERS[5:]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5(files["batches.meta"])})
    return root


@pytest.fixture
def site(archive: Path) -> Iterator[str]:
    """The address of the archive on a local server."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=archive)
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/{ARCHIVE}"
        server.shutdown()


def extract(root: Path) -> Path:
    with tarfile.open(root / ARCHIVE) as tar:
        tar.extractall(root, filter="data")
    (root / ARCHIVE).unlink()
    return root / EXTRACTED


@pytest.mark.parametrize("extracted", [False, True])
def test_the_official_archive_is_read_in_its_order(archive: Path, extracted: bool) -> None:
    if extracted:
        extract(archive)
    found = data(archive, num_classes=10, val_images=50, split="tail")
    found.setup()
    train, val, test = (found.dataset(part).samples for part in ("train", "val", "test"))
    pixels = torch.from_numpy(PIXELS).view(-1, 3, 32, 32)
    assert torch.equal(train.images, pixels[:150])
    assert torch.equal(val.images, pixels[150:200])
    assert torch.equal(test.images, pixels[200:])
    assert test.targets.tolist() == LABELS.tolist()
    assert torch.cat([train.targets, val.targets]).tolist() == LABELS.tolist() * 5
    assert found.description == "CIFAR-10 (official archive)"
    assert sorted(p.name for p in archive.iterdir()) == [cifar10._CACHE, EXTRACTED if extracted else ARCHIVE]


@pytest.mark.parametrize("extracted", [False, True])
def test_the_second_start_does_not_open_the_archive(archive: Path, extracted: bool, monkeypatch) -> None:
    if extracted:
        extract(archive)
    data(archive, num_classes=10).setup()
    monkeypatch.setattr(pickle, "load", None)
    monkeypatch.setattr(tarfile, "open", None)
    found = data(archive, num_classes=10)
    found.setup()
    assert len(found.dataset("train")) == 194


def forbid_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("opened before its checksum was compared")

    for module, name in ((pickle, "load"), (pickle, "loads"), (tarfile, "open")):
        monkeypatch.setattr(module, name, refuse)


def test_an_archive_with_another_checksum_is_not_opened(archive: Path, monkeypatch) -> None:
    with (archive / ARCHIVE).open("ab") as file:
        file.write(b"more")
    forbid_opening(monkeypatch)
    with pytest.raises(FewtokensError, match=rf"{ARCHIVE}: its checksum is not the published one.*delete it"):
        data(archive, num_classes=10).setup()


@pytest.mark.parametrize("name", [*MEMBERS, "batches.meta"])
def test_a_tampered_file_is_never_unpickled(archive: Path, tmp_path: Path, name: str) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "pwned"),)

    (extract(archive) / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(FewtokensError, match=rf"{EXTRACTED}: Dataset .*not found or corrupted.*delete it"):
        data(archive, num_classes=10).setup()
    assert not (tmp_path / "pwned").exists()
    assert not (archive / cifar10._CACHE).exists()


def test_a_missing_file_is_an_error(archive: Path) -> None:
    (extract(archive) / "data_batch_3").unlink()
    with pytest.raises(FewtokensError, match="not found or corrupted"):
        data(archive, num_classes=10).setup()


def test_members_outside_of_the_archive_are_not_extracted(archive: Path, tmp_path: Path, monkeypatch) -> None:
    with tarfile.open(archive / ARCHIVE, "w:gz") as tar:
        add(tar, "../../evil", b"x")
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5((archive / ARCHIVE).read_bytes()))  # as if the checksum did not help
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "cifar10"))
    with pytest.raises(FewtokensError, match="outside the destination"):
        data(archive, num_classes=10).setup()
    assert not list(tmp_path.rglob("evil"))


def test_the_binary_archive_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-binary.tar.gz").touch()
    with pytest.raises(FewtokensError, match=r"cifar-10-binary.tar.gz is not supported, only cifar-10-python.tar.gz"):
        data(tmp_path).setup()


@pytest.mark.parametrize("before", ["nothing", "a part of the archive"])
def test_download(archive: Path, site: str, tmp_path: Path, monkeypatch, before: str) -> None:
    root = tmp_path / "new" / "root"
    if before != "nothing":
        root.mkdir(parents=True)
        (root / ARCHIVE).write_bytes((archive / ARCHIVE).read_bytes()[:1000])
    monkeypatch.setattr(CIFAR10, "url", site)
    found = data(root, num_classes=10, download=True)
    found.setup()
    assert len(found.dataset("train")) == 194
    assert sorted(p.name for p in root.iterdir()) == [cifar10._CACHE, ARCHIVE]
    assert found.description == "CIFAR-10 (official archive)"
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/")
    data(root, num_classes=10, download=True).setup()  # not downloaded again


def test_a_wrong_download_is_deleted(site: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(CIFAR10, "url", site)
    monkeypatch.setattr(CIFAR10, "tgz_md5", "0" * 32)
    root = tmp_path / "new"
    with pytest.raises(FewtokensError, match=r"Cannot download CIFAR-10 from http://.*corrupted"):
        data(root, num_classes=10, download=True).setup()
    assert not list(root.iterdir())


def test_without_network_the_error_names_url_and_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(
        FewtokensError, match=rf"http://127.0.0.1:9/cifar-10-python.tar.gz.*save the file in {tmp_path}"
    ):
        data(tmp_path, download=True).prepare_data()
    assert not list(tmp_path.iterdir())


def test_a_silent_server_is_given_up(tmp_path: Path, monkeypatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts connections and never answers
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.getsockname()[1]}/{ARCHIVE}")
        monkeypatch.setattr(cifar10, "_PATIENCE", 0.3)
        start = time.monotonic()
        with pytest.raises(FewtokensError, match=r"Cannot download CIFAR-10 .*timed out"):
            data(tmp_path, download=True).prepare_data()
    assert time.monotonic() - start < 10
    assert socket.getdefaulttimeout() is None


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


def test_a_validation_part_may_lack_a_class(make_folders) -> None:
    found = data(make_folders(), val_images=1)
    found.setup()
    assert found.dataset("val").samples.targets.tolist() == [0]


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

    monkeypatch.setattr("fewtokens.data.cache.save_file", refuse)
    root = make_folders()
    with pytest.warns(UserWarning, match=r"Cannot write the cache .*fewtokens-cache"):
        data(root).setup()
    assert sorted(p.name for p in root.iterdir()) == ["test", "train"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"val_images": 24}, r"`data\.val_images` must be from 0 \(no validation\) to 23, got 24"),
        ({"val_images": -1}, r"`data\.val_images` must be an int >= 0"),
        ({"split": "random"}, r"`data\.split` must be 'stratified' or 'tail'"),
        ({"split": "tail"}, "order of the official archive"),
        ({"num_classes": 10}, r"`data\.num_classes` must be 3, the number of class folders .*got 10"),
        ({"image_size": 48}, r"32 x 32 pixels in the train part, got 48\. Set data\.image_size=32"),
        ({"channels": 1, "mean": [0.5], "std": [0.5]}, r"`data\.channels` must be 3"),
        ({"mean": [0.5, 0.5]}, r"`data\.mean` must be one number per channel"),
        ({"batch_size": 0}, r"`data\.batch_size` must be an int >= 1"),
        ({"batch_size": 2.5}, r"`data\.batch_size` must be an int >= 1, got 2\.5"),
        ({"seed": "one"}, r"`data\.seed` must be an int >= 0, got 'one'"),
        ({"num_workers": -1}, r"`data\.num_workers` must be an int >= 0"),
        ({"frames": 4}, r"`data\.frames` must be 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(make_folders, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(FewtokensError, match=match):
        data(make_folders(), **changes).setup()


def test_missing_data_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(
        FewtokensError, match=r"absent, which does not exist.*data.download=true.*cifar-10-python.tar.gz"
    ):
        data(tmp_path / "absent").setup()
    with pytest.raises(FewtokensError, match=r"There is no CIFAR-10 in .*train/<class>"):
        data(tmp_path).setup()


def test_bad_files_are_named(make_folders) -> None:
    root = make_folders()
    (root / "test" / "c" / "0003.png").write_bytes(b"no picture")
    with pytest.raises(FewtokensError, match=r"Cannot read the picture .*test/c/0003\.png"):
        data(root).setup()


def test_pictures_of_another_size_are_named(make_folders) -> None:
    root = make_folders()
    picture = folders.read_pil(root / "test" / "c" / "0003.png").resize((40, 32))
    picture.save(root / "test" / "c" / "0003.png")
    with pytest.raises(FewtokensError, match=r"32 x 32 pixels, but .*test/c/0003.png has 40 x 32 pixels"):
        data(root).setup()


def test_pictures_must_be_square(make_folders) -> None:
    with pytest.raises(FewtokensError, match=r"32 x 40 pixels in the train part, got 32. Make them square with Resize"):
        data(make_folders(size=(40, 32))).setup()


@pytest.mark.parametrize("name", ["d", "e"])
def test_empty_and_unmatched_class_folders_are_named(make_folders, name: str) -> None:
    root = make_folders()
    (root / "test" / name).mkdir()
    with pytest.raises(FewtokensError, match=f"none in .*test/{name}"):
        data(root).setup()
    (root / "test" / "a" / "0000.png").rename(root / "test" / name / "0000.png")
    with pytest.raises(FewtokensError, match=f"only one of them contains {name}"):
        data(root).setup()


@pytest.mark.skipif("FEWTOKENS_CIFAR10" not in os.environ, reason="FEWTOKENS_CIFAR10 names no folder with CIFAR-10")
def test_real_cifar10() -> None:
    found = data(Path(os.environ["FEWTOKENS_CIFAR10"]), num_classes=10, val_images=10_000)
    found.setup()
    assert [len(found.dataset(part)) for part in ("train", "val", "test")] == [40_000, 10_000, 10_000]
    mean = (found.dataset("train").samples.images[::10].float() / 255).mean((0, 2, 3))
    torch.testing.assert_close(mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=0.01, rtol=0)
