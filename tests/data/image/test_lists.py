"""Folders with a file of labels: the official lists of ImageNet, Hugging Face image folders, ReaL labels."""

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch

from fewtokens.data import cache
from fewtokens.data.image import folders, lists
from fewtokens.data.image.imagenet import ImageNet
from fewtokens.errors import FewtokensError
from fewtokens.tasks.classification import Classifier

WNIDS = ("n01440764", "n01443537", "n15075141")  # ILSVRC classes 0, 1, 999
ORDER = (2, 0, 1, 1, 0, 2)  # class of each picture of the flat folder


def data(root: Path, **changes: Any) -> ImageNet:
    settings: dict[str, Any] = {"num_classes": 1000, "image_size": 16, "batch_size": 4} | changes
    return ImageNet(root, **settings)


@pytest.fixture
def flat(make_folders, tmp_path: Path) -> Path:
    """Six pictures of three classes in `val`, named as ImageNet names them, in the order of `ORDER`."""
    root = make_folders(parts=("val",), classes=WNIDS, count=2, size=(24, 16), suffix="JPEG")
    target, used = tmp_path / "flat" / "val", [0, 0, 0]
    target.mkdir(parents=True)
    for number, label in enumerate(ORDER, 1):
        picture = root / "val" / WNIDS[label] / f"{used[label]:04d}.JPEG"
        shutil.copy(picture, target / f"ILSVRC2012_val_{number:08d}.JPEG")
        used[label] += 1
    return tmp_path / "flat"


def names(*suffix: str) -> list[str]:
    return [f"ILSVRC2012_val_{number:08d}{''.join(suffix)}" for number in range(1, 7)]


def write(path: Path, form: str) -> Path:
    """Write the labels of the flat folder in one of the forms that are in use."""
    path.mkdir()
    if form in ("meta.mat", "map_clsloc.txt"):
        ids = (7, 3, 9)  # ILSVRC2012_ID of each class, not in the order of the wnids
        truth = path / "ILSVRC2012_validation_ground_truth.txt"
        truth.write_text("".join(f"{ids[label]}\n" for label in ORDER))
        if form == "meta.mat":
            synsets = np.zeros(3, dtype=[("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("words", "O")])
            for row, number, wnid in zip(synsets, ids, WNIDS, strict=True):
                row["ILSVRC2012_ID"], row["WNID"], row["words"] = number, wnid, "a fish"
            scipy.io.savemat(path / form, {"synsets": synsets})
        else:
            (path / form).write_text("".join(f"{w} {n} a_fish\n" for n, w in zip(ids, WNIDS, strict=True)))
        return truth
    wnids, numbers = [WNIDS[label] for label in ORDER], [(0, 1, 999)[label] for label in ORDER]
    lines = {
        "wnids.txt": wnids,
        "val.txt": [f"{name} {number}" for name, number in zip(names(".JPEG"), numbers, strict=True)][::-1],
        "val_map.txt": [f"{name}\t{wnid}" for name, wnid in zip(names(".JPEG"), wnids, strict=True)],
        "LOC_val_solution.csv": [
            "ImageId,PredictionString",
            *(f"{name},{wnid} 1 2 3 4 {wnid} 5 6 7 8 " for name, wnid in zip(names(), wnids, strict=True)),
        ],
    }
    (path / form).write_text("\n".join(lines[form]) + "\n")
    return path / form


@pytest.mark.parametrize(
    "form", ["meta.mat", "map_clsloc.txt", "wnids.txt", "val.txt", "val_map.txt", "LOC_val_solution.csv"]
)
def test_a_flat_folder_with_an_official_list_equals_class_folders(flat: Path, tmp_path: Path, form: str) -> None:
    found = data(flat, labels=str(write(tmp_path / "lists", form)))
    found.setup("test")
    expected = data(tmp_path / "set")
    expected.setup("test")
    for (a, b), (c, d) in zip(found.test_dataloader(), expected.test_dataloader(), strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)
    assert found.class_names[999] == expected.class_names[999]
    (flat / "val" / "ILSVRC2012_img_val.tar").touch()  # the archive from which they were unpacked
    data(flat, labels=str(tmp_path / "lists" / found.labels)).setup("test")


def test_lists_that_do_not_fit_are_refused(flat: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "lists", "map_clsloc.txt")
    (path.parent / "map_clsloc.txt").unlink()
    with pytest.raises(FewtokensError, match=r"`data\.labels` must be in one folder with meta\.mat"):
        data(flat, labels=str(path)).setup("test")
    with pytest.raises(FewtokensError, match=r"set data\.labels to a file"):
        data(flat).setup("test")
    path = path.with_name("labels.txt")
    for content, match in (
        ("a\nb\n", "one label for each of the 6 pictures .*got 2"),
        ("x.JPEG 1\n", r"no label for ILSVRC2012_val_00000001\.JPEG, .*\(6 in all\)"),
        ("x.JPEG\nx 1\n", "Expected csv or jsonl"),
    ):
        path.write_text(content)
        with pytest.raises(FewtokensError, match=match):
            lists.read_folder(flat / "val", path)
    with pytest.raises(FewtokensError, match=r"Cannot read the labels in .*absent"):
        lists.read_folder(flat / "val", path.with_name("absent"))


@pytest.mark.parametrize("form", ["metadata.csv", "metadata.jsonl"])
def test_a_hugging_face_image_folder_is_read(make_folders, form: str) -> None:
    root = make_folders(parts=("train", "validation"), classes=("a", "b"), count=3, size=(24, 16))
    for part in ("train", "validation"):
        rows = [
            {"file_name": f"{c}/000{i}.png", "caption": "x", "label": ("tabby cat", "dog")[(i + k) % 2]}
            for k, c in enumerate("ab")
            for i in range(3)
        ]
        with (root / part / form).open("w", newline="") as file:
            if form == "metadata.csv":
                writer = csv.DictWriter(file, rows[0].keys())
                writer.writeheader()
                writer.writerows(rows)
            else:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    found = data(root, num_classes=2)
    found.setup("fit")
    assert list(found.class_names) == ["dog", "tabby cat"]
    samples = found.dataset("val")
    assert samples is not None
    assert [str(samples.files.path(i).relative_to(root)) for i in range(2)] == [
        "validation/a/0001.png",
        "validation/b/0000.png",
    ]
    assert samples.targets.tolist() == [0, 0, 0, 1, 1, 1]


def test_lists_with_unusual_names_and_several_rows(make_folders, tmp_path: Path, caplog) -> None:
    root = make_folders(parts=("all",), classes=("a",), count=4, size=(8, 8)) / "all"
    names = ("x.jpg", "x.png", "new\nline.png", "a\u2028b, c.png")
    for number, name in enumerate(names):
        (root / "a" / f"{number:04d}.png").rename(root / name)
    (root / "a").rename(tmp_path / "away")
    (root / "a").symlink_to(tmp_path / "away")
    (root / "new\nline.png").rename(root / "a" / "new\nline.png")
    rows = dict(zip(("x.jpg", "x.png", "a/new\nline.png", "a\u2028b, c.png"), "3210", strict=True))
    table, objects = root / "labels.csv", root / "labels.jsonl"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "label"), *rows.items(), ("absent.png", "1"), ()])
    objects.write_text(
        "".join(json.dumps({"file_name": k, "label": v}, ensure_ascii=False) + "\n" for k, v in rows.items())
    )
    for path in (table, objects):
        found = lists.read_folder(root, path)
        assert {os.fsdecode(f): found.classes[t] for f, t in zip(found.files, found.targets, strict=True)} == rows
    assert "names 1 pictures that are not in" in caplog.text
    for path, content, match in (
        (table, table.read_text() + "x.png,1\n", r"must name one class of every picture, got several for x\.png"),
        (table, "file_name,label\nx.jpg," + "9" * 200_000, "field larger than field limit"),
        (objects, "[1, 2]\n", r"a line is no object but \[1, 2\]"),
        (objects, '{"file_name": 5, "label": 1}\n', "file_name is no text but 5"),
        (objects, "[" * 100_000, "RecursionError"),
    ):
        path.write_text(content)
        with pytest.raises(FewtokensError, match=match):
            lists.read_folder(root, path)


def test_tar_files_beside_class_folders_are_ignored(make_folders) -> None:
    root = make_folders(parts=("val",), classes=WNIDS, count=1)
    (root / "val" / f"{WNIDS[0]}.tar").write_bytes(b"the archive from which the folder was unpacked")
    found = data(root)
    found.setup("test")
    assert found.dataset("test").targets.tolist() == [0, 1, 999]


def test_parts_have_the_numbers_of_the_training_classes(make_folders, tmp_path: Path) -> None:
    root = make_folders(parts=("train", "val", "other"), classes=("a", "b", "c"), count=1)
    shutil.rmtree(root / "val" / "b")
    for stage in ("fit", "validate"):
        found = data(root, num_classes=3)
        found.setup(stage)
        assert found.dataset("val").targets.tolist() == [0, 2]
        assert list(found.class_names) == ["a", "b", "c"]
    (root / "other" / "b").rename(root / "other" / "x")
    with pytest.raises(FewtokensError, match=r"which has no x\. Rename the folders"):
        data(root, num_classes=3, parts={"test": "other"}).setup("test")
    with pytest.raises(FewtokensError, match=r"`data\.parts` must be a mapping"):
        data(root, parts={"tset": "other"})


def test_folders_inside_of_class_folders_are_named(make_folders, caplog) -> None:
    root = make_folders(parts=("train",), classes=("a", "b"), count=2)
    folders.scan(root / "train", "")
    assert not caplog.text
    (root / "train" / "b" / "more").mkdir()
    (root / "train" / "b" / "0001.png").rename(root / "train" / "b" / "more" / "0001.png")
    assert len(folders.scan(root / "train", "").files) == 3
    assert "are not read: b/more" in caplog.text


def test_image_net_v2_has_numbered_folders(make_folders) -> None:
    root = make_folders(parts=("v2",), classes=("0", "1", "10", "999"), count=1)
    found = data(root, parts={"test": str(root / "v2")})
    found.setup("test")
    assert found.dataset("test").targets.tolist() == [0, 1, 10, 999]
    assert "tench" in found.class_names[0]


def test_subsets_depend_on_their_seed_only_and_are_nested(make_folders) -> None:
    root = make_folders(parts=("train", "val"), classes=("a", "b", "c"), count=20, size=(16, 16))

    def files(**subset: Any) -> set[bytes]:
        found = data(root, num_classes=subset.get("classes") or 3, subset=subset)
        found.setup("fit")
        assert len(found.dataset("val")) == 20 * found.num_classes
        counts = found.dataset("train").targets.bincount().tolist()
        assert len(set(counts)) == 1
        assert len(counts) == found.num_classes
        return set(found.dataset("train").files.files.tolist())

    assert len(files(share=0.1)) == 6
    assert len(files(share=0.01)) == 3
    assert files(share=0.1) < files(share=0.5)
    assert files(share=0.1) == files(share=0.1)
    assert files(share=0.1) != files(share=0.1, seed=1)
    assert {name[:1] for name in files(classes=2)} == {b"a", b"b"}
    assert files(classes=2, share=0.1) < files(share=0.1)
    for wrong, match in (({"share": 0.0}, "share"), ({"classes": 0}, "classes"), ({"seed": -1}, "seed")):
        with pytest.raises(FewtokensError, match=rf"`data\.subset\.{match}` must be"):
            data(root, subset=wrong)


def test_a_large_list_is_kept_until_a_class_folder_changes(make_folders, tmp_path: Path, monkeypatch) -> None:
    root = make_folders(parts=("train",), classes=("a", "b"), count=3, size=(8, 8)) / "train"
    scans, scan = [], folders.scan
    monkeypatch.setattr(folders, "scan", lambda *args: scans.append(args) or scan(*args))
    kept = root / ".fewtokens-files.safetensors"

    def count(scanned: int) -> folders.ClassFolders:
        scans.clear()
        found = folders.scan_cached(root, "")
        assert len(scans) == scanned
        assert found.files.tolist() == scan(root, "").files.tolist()
        assert torch.equal(found.targets, scan(root, "").targets)
        return found

    def age() -> None:
        for folder in root.iterdir():
            os.utime(folder, ns=(0, os.stat(folder).st_mtime_ns - 10**10))

    count(1)
    age()
    count(1)  # few files are not worth a cache
    assert not kept.exists()
    monkeypatch.setattr(folders, "_LARGE", 6)
    count(1)
    assert kept.exists()
    assert count(0).path(5) == root / "b" / "0002.png"
    (root / "b" / "0001.png").rename(root / "b" / "0009.png")
    count(1)  # too young for a cache
    age()
    count(1)
    count(0)
    kept.write_bytes(kept.read_bytes()[:200])
    count(1)
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    count(1)
    count(0)
    assert len(list((tmp_path / "home" / "fewtokens").iterdir())) == 1
    monkeypatch.setattr(cache, "save_file", pytest.fail)
    count(0)


def test_real_labels_count_any_of_them_and_leave_out_pictures_without(flat: Path, tmp_path: Path) -> None:
    labels = write(tmp_path / "lists", "val.txt")
    real = labels.with_name("real.json")
    real.write_text(json.dumps([[999, 5], [], [1], [1, 2, 3], [4], [7]]))
    found = data(flat, labels=str(labels), real_labels=str(real))
    found.setup("test")
    targets = torch.cat([targets for _, targets in found.test_dataloader()])
    rows = [sorted(row.nonzero().flatten().tolist()) for row in targets]
    assert sorted(rows) == [[1], [1, 2, 3], [4], [5, 999], [7]]
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(5))
    task = Classifier(torch.nn.Identity(), 1000, lambda groups: torch.optim.SGD(groups, 0.1))
    logits = torch.zeros(5, 1, 1000)
    order = {tuple(row): index for index, row in enumerate(rows)}
    for row, best in (((1,), 1), ((1, 2, 3), 3), ((4,), 5), ((5, 999), 999), ((7,), 8)):  # three of five are right
        logits[order[row], 0, best] = 1.0
    task.test_step((logits, targets), 0)
    assert float(task.test_metrics["top1"].compute()) == pytest.approx(0.6)
    assert not torch.isinf(task.test_metrics["loss"].compute())
    found.setup("validate")
    assert next(iter(found.val_dataloader()))[1].ndim == 1
    real.write_text("[[], [], [], [], [], []]")
    with pytest.raises(FewtokensError, match=r"`data\.real_labels` must be a file with labels of some"):
        data(flat, labels=str(labels), real_labels=str(real)).setup("test")
    for content in ("{", "[[1], [2000]]", "[1]", "[[1]]", "[[1.5]]", "[" * 100_000):
        real.write_text(content)
        with pytest.raises(FewtokensError, match=r"Cannot use the ReaL labels"):
            data(flat, labels=str(labels), real_labels=str(real)).setup("test")
