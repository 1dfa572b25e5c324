"""Tar shards: the batches of the folders they were made from, exact over ranks, workers and resumes, and damage."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from PIL import Image
from safetensors.numpy import save

from fewtokens.data import shard
from fewtokens.data.image import shards
from fewtokens.data.image.folders import UnreadablePictureError
from fewtokens.data.image.imagenet import ImageNet, class_names
from fewtokens.data.samplers import EvalSampler, TrainSampler
from fewtokens.errors import FewtokensError

WNIDS = ("n01440764", "n01443537", "n15075141")


def data(root: Path, **changes: Any) -> ImageNet:
    settings: dict[str, Any] = {"num_classes": 3, "image_size": 32, "batch_size": 4} | changes
    return ImageNet(root, **settings)


@pytest.fixture
def root(make_folders) -> Path:
    return make_folders(parts=("train", "val"), classes=WNIDS, count=5, size=(56, 40), suffix="JPEG")


@pytest.fixture
def sharded(root: Path) -> Path:
    """Shards of 4 pictures each of both parts."""
    for part in ("train", "val"):
        write(root / part, root.parent / "shards" / part)
    return root.parent / "shards"


def write(source: Path, target: Path, *options: str, code: int = 0) -> None:
    arguments = [str(source), "--write", str(target), "--samples", "4", "--workers", "1", *options]
    assert shard.main(arguments) == code


def members(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return tar.getnames()


def batches(loader: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(images.clone(), targets.clone()) for images, targets in loader]


def test_batches_equal_those_of_the_folders(root: Path, sharded: Path) -> None:
    for stage, workers in (("fit", 0), ("fit", 2), ("test", 0)):
        found = [data(where, num_workers=workers) for where in (root, sharded)]
        for one in found:
            one.setup(stage)
        loaders = [one.train_dataloader() if stage == "fit" else one.test_dataloader() for one in found]
        for (a, b), (c, d) in zip(*map(batches, loaders), strict=True):
            assert torch.equal(a, c)
            assert torch.equal(b, d)
        assert found[0].class_names == found[1].class_names


def test_every_sample_once_over_ranks_and_workers_and_after_a_resume(sharded: Path) -> None:
    found = data(sharded, num_workers=2, batch_size=2)
    found.setup("fit")
    samples = found.dataset("val")
    assert samples is not None

    def transform(path: Path) -> torch.Tensor:
        number = 10 * WNIDS.index(path.parent.name) + int(path.stem)
        return torch.full((3, 32, 32), number, dtype=torch.uint8)

    samples.decode, samples.transform = lambda content, path: path, transform

    def names(sampler: Any) -> list[int]:
        loader = found._loader(samples, sampler, 2, False, "val")
        return [int(x) for images, _ in loader for x in images[:, 0, 0, 0]]

    every = [10 * k + i for k in range(3) for i in range(5)]
    ranks = [names(EvalSampler(15, rank=rank, world=2)) for rank in range(2)]
    assert sorted(ranks[0] + ranks[1]) == every
    settings: dict[str, Any] = {"batch_size": 2, "world": 2, "epoch": 1, "stamped": True}
    ranks = [names(TrainSampler(15, rank=rank, **settings)) for rank in range(2)]
    assert len(set(ranks[0] + ranks[1])) == 14
    for rank in range(2):
        resumed = TrainSampler(15, rank=rank, **settings)
        resumed.skip(1, 2)
        assert names(resumed) == ranks[rank][4:]


def test_shards_at_a_short_side_are_close_and_small_pictures_stay_as_they_are(root: Path, tmp_path: Path) -> None:
    write(root / "val", tmp_path / "small" / "val", "--short-side", "24", "--quality", "95")
    write(root / "val", tmp_path / "same" / "val", "--short-side", "100")
    small, same = (shards.load(tmp_path / name / "val") for name in ("small", "same"))
    for index in (0, 14):
        path = root / "val" / WNIDS[index // 5] / f"000{index % 5}.JPEG"
        assert same.read(index).numpy().tobytes() == path.read_bytes()
        scaled = Image.open(io.BytesIO(small.read(index).numpy()))
        assert scaled.size == (33, 24)


def test_tarfile_reads_the_shards(root: Path, sharded: Path) -> None:
    names = (sharded / "val" / shards.CLASSES).read_text().split()
    seen = []
    for path in sorted((sharded / "val").glob("*.tar")):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            for picture, label in zip(members[::2], members[1::2], strict=True):
                assert picture.name.removesuffix(".jpg") == label.name.removesuffix(".cls")
                name = names[int(tar.extractfile(label).read())]  # type: ignore[union-attr]
                content = tar.extractfile(picture).read()  # type: ignore[union-attr]
                file = root / "val" / name / f"{picture.name.split('-')[1].removesuffix('.jpg')}.JPEG"
                assert content == file.read_bytes()
                seen.append(file)
    assert len(set(seen)) == len(seen) == 15


def test_shards_from_elsewhere_are_indexed(root: Path, sharded: Path) -> None:
    expected = shards.load(sharded / "val")
    for name in (shards.INDEX, shards.CLASSES):
        (sharded / "val" / name).unlink()
    with pytest.raises(FewtokensError, match=r"has no index\. Write it with: .*--index"):
        data(sharded).setup("test")
    assert shard.main(["--index", str(sharded / "val")]) == 0
    found = shards.load(sharded / "val")
    assert found.classes == ["0", "1", "2"]
    assert torch.equal(found.targets, expected.targets)
    assert (found.spans == expected.spans).all()


@pytest.mark.parametrize("damage", ["truncated", "missing", "another", "index", "version"])
def test_damage_is_found_before_training(sharded: Path, damage: str) -> None:
    path = sharded / "val" / "val-000001.tar"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "missing":
        path.unlink()
    elif damage == "another":
        content = path.read_bytes()
        path.write_bytes(content[512:] + content[:512])
    else:
        index = sharded / "val" / shards.INDEX
        content = index.read_bytes()
        index.write_bytes(content[:100] if damage == "index" else content.replace(b'"version":"1"', b'"version":"0"'))
    match = "val-000001.tar" if damage in ("truncated", "missing", "another") else "has an index that cannot be read"
    with pytest.raises(FewtokensError, match=match):
        data(sharded).setup("test")
    if damage in ("truncated", "another"):
        assert shard.main(["--index", str(sharded / "val")]) == 1


def tar(path: Path, members: dict[str, bytes], after: bytes = b"", link: str = "") -> bytes:
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            if name == link:
                member.type, member.linkname = tarfile.LNKTYPE, "elsewhere"
            file.addfile(member, None if name == link else io.BytesIO(content))
    path.write_bytes(path.read_bytes() + after)
    return path.read_bytes()


def test_a_tar_file_that_would_lose_pictures_is_not_indexed(tmp_path: Path) -> None:
    path, three = tmp_path / "a.tar", {f"{key}.{end}": b"0" for key in "abc" for end in ("jpg", "cls")}
    content = tar(path, three)
    damaged = content[:4096] + b"\xff" * 100 + content[4196:]
    for wrong, match in (
        (damaged, "damaged at byte 4096"),
        (content[:4196], "truncated|damaged"),
        (content[:4096], "truncated"),
        (content + content, "several files one after the other"),
        (tar(path, three | {"a.png": b"1"}), r"a\.png is there twice"),
        (tar(path, three | {"a.cls": b"-1"}), r"a\.cls is no number >= 0"),
        (tar(path, three, link="b.jpg"), r"b\.jpg is no file"),
        (tar(path, three | {"d.cls": b"1", "d.psd": b""}), "d has no picture"),
        (tar(path, three | {"d.jpg": b"1"}), "d has no class"),
    ):
        path.write_bytes(wrong)
        with pytest.raises(FewtokensError, match=f"Cannot index .*{match}"):
            shards.scan_tar(path)
    tar(path, three, after=bytes(20_000))
    assert len(shards.scan_tar(path)[1]) == 3


def test_an_index_that_does_not_fit_its_folder_is_refused(sharded: Path) -> None:
    folder = sharded / "val"
    shutil.copy(folder / "val-000000.tar", folder / "added.tar")
    with pytest.raises(FewtokensError, match=r"has tar files that its .* does not know: added\.tar\. .*--index"):
        data(sharded).setup("test")
    (folder / "added.tar").unlink()
    with safetensors.safe_open(folder / shards.INDEX, framework="numpy") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    changes: list[tuple[str, Callable[[Any], Any]]] = [
        ("names", lambda x: x[0]),
        ("targets", lambda x: x[:-1]),
        ("targets", lambda x: x + 1),
        ("targets", lambda x: x - 1),
        ("spans", lambda x: x + 4),
        ("spans", lambda x: x[:0]),
    ]
    for name, change in changes:
        changed = tensors | {name: np.ascontiguousarray(change(tensors[name]))}
        (folder / shards.INDEX).write_bytes(save(changed, metadata))
        with pytest.raises(FewtokensError, match="has an index that cannot be read"):
            shards.load(folder)


def test_shards_of_unusual_names_and_of_one_writer_at_a_time(root: Path, tmp_path: Path) -> None:
    names = (b"\xff", "a\u2028b".encode(), b"n\new")
    for old, new in zip(WNIDS, names, strict=True):
        (root / "val" / old).rename(root / "val" / os.fsdecode(new))
    (root / "val" / "n\new" / "0000.JPEG").rename(root / "val" / "n\new" / os.fsdecode(b"\xfe.JPEG"))
    target = tmp_path / "out" / "val"
    target.mkdir(parents=True)
    (target / "settings.json").write_text("{")
    write(root / "val", target, code=1)
    (target / "settings.json").unlink()
    code = "import fcntl,sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-S", "-c", code, str(target / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        write(root / "val", target, code=1)
        other.communicate(b"\n")
    write(root / "val", target)
    found = data(tmp_path / "out")
    found.setup("test")
    assert sorted(map(os.fsencode, found.class_names)) == sorted(names)
    assert class_names(target) == list(found.class_names)
    assert len(list(found.test_dataloader())) == 4
    assert shards.read_classes(target / shards.CLASSES) == [x.replace("\n", " ") for x in found.class_names]


def test_a_tar_that_is_truncated_while_it_is_used_is_named(sharded: Path) -> None:
    found = data(sharded)
    found.setup("test")
    for path in (sharded / "val").glob("*.tar"):
        path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(FewtokensError, match=r"val-00000\d\.tar/.*: the tar file is truncated"):
        list(found.test_dataloader())


def test_hostile_pictures_are_handled_or_named(root: Path, tmp_path: Path, capsys) -> None:
    folder = root / "val" / WNIDS[0]
    first = Image.open(folder / "0000.JPEG")
    first.save(folder / "0000.JPEG", format="PNG")
    first.convert("CMYK").save(folder / "0001.JPEG")
    first.convert("L").save(folder / "0002.JPEG")
    target = tmp_path / "out" / "val"
    write(root / "val", target)
    found = shards.load(target)
    assert found.read(0).numpy().tobytes() == (folder / "0000.JPEG").read_bytes()
    listed = [name for path in target.glob("*.tar") for name in members(path)]
    assert "00000000-0000.png" in listed  # named by what it is, since other tools choose the decoder by the suffix
    shutil.copytree(target, tmp_path / "out" / "train")
    one = data(tmp_path / "out")
    one.setup("fit")
    assert sum(len(targets) for _, targets in [*one.train_dataloader(), *one.val_dataloader()]) == 30
    capsys.readouterr()

    (folder / "0003.JPEG").write_bytes(b"")
    (folder / "0004.JPEG").write_bytes((folder / "0002.JPEG").read_bytes()[:300])
    other = tmp_path / "other" / "val"
    write(root / "val", other, code=1)
    printed = capsys.readouterr()
    assert "0003.JPEG" in printed.out
    assert "0004.JPEG" in printed.out
    assert "2 of 15 pictures cannot be read" in printed.err
    assert not (other / shards.INDEX).exists()
    write(root / "val", other, "--skip")  # writes no shard again
    assert len(shards.load(other).files) == 13


def test_a_stopped_run_continues_and_gives_the_same_files(
    root: Path, sharded: Path, tmp_path: Path, monkeypatch
) -> None:
    target, write_shard, written = tmp_path / "val", shard._write_shard, []

    def stop(path: Path, *arguments: Any) -> Any:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        return write_shard(path, *arguments)

    monkeypatch.setattr(shard, "_write_shard", stop)
    write(root / "val", target, code=130)
    assert not (target / shards.INDEX).exists()
    written.append("third")
    write(root / "val", target)
    assert len(written) == 5
    for name in ("SHA256SUMS", shards.CLASSES):
        assert (target / name).read_bytes() == (sharded / "val" / name).read_bytes()
    found, expected = shards.load(target), shards.load(sharded / "val")
    assert (found.spans == expected.spans).all()
    assert found.shards == expected.shards
    assert found.files.tolist() == expected.files.tolist()
    write(root / "val", target)  # complete
    assert len(written) == 5
    write(root / "val", target, "--short-side", "32", code=1)
    write(root / "val", root / "train", code=1)


def test_processes_write_the_same_shards(root: Path, sharded: Path, tmp_path: Path) -> None:
    write(root / "val", tmp_path / "val", "--workers", "2")
    for path in (sharded / "val").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "val" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], "Give a folder of pictures and --write"),
        (["{root}/val", "--write", "{root}/x", "--short-side", "8"], "`--short-side` must be at least 16"),
        (["{root}/absent", "--write", "{root}/x"], "absent does not exist"),
        (["--index", "{root}/val"], "There are no tar files"),
    ],
)
def test_mistakes_are_answered_with_a_sentence(root: Path, capsys, arguments: list[str], match: str) -> None:
    assert shard.main([word.format(root=root) for word in arguments]) == 1
    assert match in capsys.readouterr().err


def test_errors_survive_the_way_from_a_worker() -> None:
    error = UnreadablePictureError("a/b.jpg", "it is empty")
    assert error.__reduce__()[1] == ("a/b.jpg", "it is empty")
