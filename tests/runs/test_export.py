"""Export: files compute what the model computes, for every tokenizer in configs/, or they are not written."""

import math
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from conftest import CONFIGS, ROOT, TINY
from fewtokens.backbones.vit import ViT
from fewtokens.backbones.vivit import Model
from fewtokens.errors import FewtokensError
from fewtokens.runs import export, model_file
from fewtokens.runs import train as training
from fewtokens.runs.config import instantiate
from fewtokens.tokenizers.base import Tokenizer

TOKENIZERS = sorted(path.stem for path in (CONFIGS / "tokenizer").glob("*.yaml"))
# One method each that acts before, inside and around a block, and one whose shapes depend on values in eager mode.
ALWAYS = ("token_learner", "tome", "token_fuser", "ats")


def model_with(composed, *overrides: str, seed: int = 0) -> ViT:
    """Return a mini ViT without parameters of zero, whose attention is not uniform."""
    small = ["data.image_size=8", "backbone.patch_size=2", "backbone.dim=32", "backbone.heads=2", "backbone.depth=3"]
    cfg = composed("backbone.pool=token", *small, *overrides)
    torch.manual_seed(seed)
    model = instantiate(cfg.backbone)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def images(count: int = 7) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def check_files(model: nn.Module, folder: Path, *suffixes: str) -> torch.export.ExportedProgram:
    """Export a model, compare the files with it in batches of several sizes, and return the traced program."""
    program = model_file.trace(model, images(2), any_batch=True)
    for suffix in suffixes:
        model_file.write(program, folder / f"model{suffix}")
        found = export.compare(model, model_file.read(folder / f"model{suffix}"), images(100), 1e-4, None)
        assert found.batches == (1, 3, 32)
        assert found.mismatched <= (0.02 if model_file.compares_scores(program) else 0)
        assert found.same_class >= 0.98
        assert str(ROOT).encode() not in (folder / f"model{suffix}").read_bytes(), "no paths of this machine"
    assert sorted(file.suffix for file in folder.iterdir()) == sorted(suffixes), "one file each"
    return program


@pytest.mark.parametrize(
    "tokenizer", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in TOKENIZERS]
)
def test_a_file_equals_eager_in_batches_of_any_size(composed, tmp_path: Path, tokenizer: str) -> None:
    formats = (".pt2", ".onnx") if tokenizer in ALWAYS else (".pt2",)
    program = check_files(model_with(composed, f"tokenizer={tokenizer}"), tmp_path, *formats)
    soft = tokenizer.startswith(("token_", "sinkhorn", "sit", "patch_merger", "pool", "none", "fixed_pattern"))
    assert model_file.compares_scores(program) == (not soft)


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", [name for name in TOKENIZERS if name not in ALWAYS])
def test_so_does_onnx_of_every_other_tokenizer(composed, tmp_path: Path, tokenizer: str) -> None:
    check_files(model_with(composed, f"tokenizer={tokenizer}"), tmp_path, ".onnx")


@pytest.mark.slow
@pytest.mark.parametrize("options", [["tokenizer.build.rule=inverse_transform"], ["tokenizer.build.budget=0.4"]])
def test_every_rule_of_ats(composed, tmp_path: Path, options: list[str]) -> None:
    check_files(model_with(composed, "tokenizer=ats", *options), tmp_path, ".onnx", ".pt2")


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["avg", "max", "map"])
def test_poolings_in_which_sizes_count(composed, tmp_path: Path, pool: str) -> None:
    overrides = ["tokenizer=tome", "tokenizer.build.r=3", f"backbone.pool={pool}"]
    check_files(model_with(composed, *overrides), tmp_path, ".onnx")


class Sorted(nn.Module):
    """Sorts positions by their values, as selecting methods do, and finds where other values belong among them."""

    def forward(self, images):
        flat = images.flatten(1)
        parts = []
        for keys in (flat, flat.long(), flat.int(), flat.double()):
            parts += [keys.sort(dim=1, stable=True, descending=descending).indices for descending in (False, True)]
        levels = flat.sort(dim=1, stable=True).values.contiguous()
        for side in ("left", "right"):
            parts.append(torch.searchsorted(levels, flat[:, :5].contiguous(), side=side))
        return torch.cat([part.float() for part in parts], dim=1)


def test_onnx_orders_equal_values_as_torch_does(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model_file.write(model_file.trace(Sorted(), images(2), any_batch=True), path)
    forward = model_file.read(path)
    for levels in (1, 2, 5):
        ties = torch.randint(0, levels, (3, 1, 32, 32)).float()
        small = ties[:, :, :8, :8].contiguous()
        assert torch.equal(forward(small), Sorted()(small))


class Extremes(nn.Module):
    """Marks the smallest and the largest of some large integers with equal upper halves."""

    def forward(self, images):
        numbers = (images.double() * 2**31).long() + 2**38
        least, greatest = numbers.amin(dim=3, keepdim=True), numbers.amax(dim=3)[..., None]
        return torch.cat([numbers == least, numbers == greatest], dim=1).float().flatten(1)


def test_onnx_finds_the_smallest_of_large_integers(tmp_path: Path) -> None:
    pictures, path = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(2)) * 2, tmp_path / "model.onnx"
    model_file.write(model_file.trace(Extremes(), pictures[:2], any_batch=True), path)
    assert torch.equal(model_file.read(path)(pictures), Extremes()(pictures)), "ReduceMin of int64 would not"


def test_a_file_of_fixed_batch_size_takes_no_other(composed, tmp_path: Path) -> None:
    model, path = model_with(composed, "tokenizer=top_k"), tmp_path / "model.onnx"
    model_file.write(model_file.trace(model, images(3), any_batch=False), path)
    found = export.compare(model, model_file.read(path), images(7), 1e-4, 3)
    assert (found.mismatched, found.batches) == (0, (3,))
    with pytest.raises(Exception, match="dimension"):
        model_file.read(path)(images(2))


def off_by(difference: float, share: float) -> model_file.Forward:
    """Return a file that computes a logit wrongly on the first images of each batch."""

    def forward(batch):
        logits = Sums()(batch)
        logits[: math.ceil(share * len(batch)), 0] += difference
        return logits

    return forward


class Sums(nn.Module):
    """Two logits, of the size of 1."""

    def forward(self, images):
        mean = images.mean(dim=(1, 2, 3))
        return torch.stack([mean, -mean], dim=1)


def test_a_difference_is_measured_on_every_image() -> None:
    found = export.compare(Sums(), off_by(0.0, 1.0), images(64), 1e-4, None)
    assert found == export.Agreement(0.0, mismatched=0.0, unexplained=0.0, same_class=1.0, batches=(1, 31, 32))
    found = export.compare(Sums(), off_by(0.01, 1.0), images(64), 1e-4, 32)
    assert (found.difference, found.mismatched, found.unexplained) == (pytest.approx(0.01, rel=1e-4), 1, 1)
    found = export.compare(Sums(), off_by(9.0, 0.25), images(64), 1e-4, 32)
    assert (found.mismatched, found.same_class) == (0.25, pytest.approx(1 - 0.25 / 2, abs=0.1))
    found = export.compare(Sums(), off_by(torch.nan, 0.25), images(64), 1e-4, 32)
    assert (found.difference, found.mismatched) == (torch.inf, 0.25)


@pytest.mark.parametrize(
    ("wrong", "compares_scores", "accepted"),
    [
        (off_by(0.0, 1.0), False, True),
        (off_by(1e-5, 1.0), False, True),  # within the tolerance
        (off_by(0.01, 1 / 64), False, False),
        (off_by(0.01, 1 / 64), True, False),  # a single image, but the model makes no close choice on it
        (off_by(1e-3, 1.0), True, False),
        (off_by(torch.nan, 1 / 64), True, False),
        (lambda batch: Sums()(batch).flip(1), True, False),
    ],
)
def test_a_file_that_computes_something_else_is_refused(
    composed, wrong: model_file.Forward, compares_scores: bool, accepted: bool
) -> None:
    settings = composed(base="export").export
    found = export.compare(Sums(), wrong, images(64), settings.tolerance, 64)
    if accepted:
        export.require(found, "onnx", settings, compares_scores)
    else:
        with pytest.raises(FewtokensError, match="does not compute the same as the model"):
            export.require(found, "onnx", settings, compares_scores)
        with pytest.raises(FewtokensError, match="does not compute the same as the model"):
            export.require(found, "onnx", composed("export.max_mismatched=0", base="export").export, compares_scores)


class Larger(nn.Module):
    """Logits that jump where the first pixel becomes larger than the second."""

    def __init__(self, equal_counts: bool = False) -> None:
        super().__init__()
        self.equal_counts = equal_counts

    def forward(self, images):
        first, second = images[:, 0, 0, 0], images[:, 0, 0, 1]
        larger = (first >= second if self.equal_counts else first > second).float()
        return torch.stack([larger, -larger], dim=1)


@pytest.mark.parametrize(("ties", "accepted"), [(1, True), (2, False)])
def test_a_choice_between_equal_scores_may_differ_on_few_images(composed, ties: int, accepted: bool) -> None:
    batch, settings = images(64), composed(base="export").export
    batch[:ties, 0, 0, 1] = batch[:ties, 0, 0, 0]
    found = export.compare(Larger(), Larger(equal_counts=True), batch, settings.tolerance, 64)
    assert (found.mismatched, found.unexplained) == (ties / 64, 0)
    if accepted:
        export.require(found, "onnx", settings, True)
    for limits, compares_scores in (
        (settings, False),
        (composed("export.max_mismatched=0", base="export").export, True),
    ):
        with pytest.raises(FewtokensError, match="does not compute the same as the model"):
            export.require(found, "onnx", limits, compares_scores)


class Counts(Tokenizer):
    """Keeps as many patches as are positive on average: a shape that depends on values."""

    def forward(self, tokens, block):
        count = max(1, int((tokens.patches.mean(dim=2) > 0).sum()) // len(tokens.x))
        return block(tokens.select(torch.arange(count).expand(len(tokens.x), -1)))


class Draws(Tokenizer):
    """Adds noise in evaluation too."""

    def forward(self, tokens, block):
        return block(tokens.update(tokens.x + torch.randn_like(tokens.x)))


class Bessel(Tokenizer):
    """An operation that ONNX does not have."""

    def forward(self, tokens, block):
        return block(tokens.update(torch.special.bessel_j0(tokens.x)))


@pytest.mark.parametrize(
    ("method", "words"),
    [(Counts, "torch.export fails with Counts.*static shapes"), (Draws, "second forward pass differ with Draws")],
)
def test_what_cannot_be_traced_is_an_error_with_a_sentence(composed, method: type[Tokenizer], words: str) -> None:
    model = model_with(composed, "tokenizer=none")
    model.encoder.layers[1].tokenizer = method(model.encoder.tokenizers[1].context)
    with pytest.raises(FewtokensError, match=words):
        model_file.trace(model, images(2), any_batch=True)


def test_what_onnx_lacks_is_named(composed, tmp_path: Path) -> None:
    model = model_with(composed, "tokenizer=none")
    model.encoder.layers[1].tokenizer = Bessel(model.encoder.tokenizers[1].context)
    program = model_file.trace(model, images(2), any_batch=True)
    model_file.write(program, tmp_path / "model.pt2")
    with pytest.raises(FewtokensError, match=r"bessel_j0.*torch_export"):
        model_file.write(program, tmp_path / "model.onnx")


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    model_file.check_packages(["onnx", "torch_export"])
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    model_file.check_packages(["torch_export"])
    with pytest.raises(FewtokensError, match=r"there is no onnxscript.*\.\[export\]"):
        model_file.check_packages(["onnx"])


def test_weights_beside_the_file_are_published_before_it(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    for name in ("m.onnx", "m.onnx.data"):
        (tmp_path / "part" / name).write_text(name)
        (tmp_path / name).write_text("old")
    files = model_file.publish(tmp_path / "part", tmp_path / "m.onnx")
    assert [file.name for file in files] == ["m.onnx.data", "m.onnx"]
    assert [file.read_text() for file in files] == ["m.onnx.data", "m.onnx"]


def test_a_trained_run_under_another_tokenizer(composed, tmp_path: Path, capsys) -> None:
    training.run(composed(*TINY, "tokenizer=none", "tokenizer.at=[]", "backbone.pool=token"))
    checkpoint = tmp_path / "run" / "checkpoints" / "best.ckpt"

    def write(*overrides: str) -> list[Path]:
        target = f"export.path={tmp_path / 'files' / 'vit.v1'}"
        return export.run(composed(f"checkpoint={checkpoint}", target, *overrides, base="export", directory="export"))

    files = write("tokenizer=evit", "tokenizer.at=1", "export.format=[onnx,torch_export]", "export.num_images=40")
    assert [file.name for file in files] == ["vit.v1.onnx", "vit.v1.pt2"]
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == ["vit.v1.onnx", "vit.v1.pt2"]
    shown = capsys.readouterr().out
    assert "test images by 1, 7, 32" in " ".join(shown.split())
    assert "100.0%" in shown
    assert '"status": "finished"' in (tmp_path / "export" / "run.json").read_text()
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]["model.vit.head.bias"]
    program = torch.export.load(files[1])
    assert any(torch.equal(value, weights) for value in program.state_dict.values()), "the run's weights"
    with pytest.raises(FewtokensError, match="must be trained first"):
        write("tokenizer=token_learner", "tokenizer.at=1")


@pytest.fixture
def plain_job(composed, tmp_path: Path):
    """A dense model from random weights, on random images, as torch's own file."""

    def make(*overrides: str):
        fixed = ["export.images=random", "export.num_images=3", "export.format=torch_export"]
        target = f"export.path={tmp_path / 'model.pt2'}"
        return composed(*TINY, "tokenizer=none", "tokenizer.at=[]", *fixed, target, *overrides, base="export")

    return make


CLIPS = ["backbone=vivit_mini", "backbone.depth=2", "backbone.dim=16", "backbone.heads=2", "backbone.temporal_depth=1",
         "data.frames=4", "data.image_size=16", "export.images=random", "export.num_images=3"]  # fmt: skip


@pytest.mark.parametrize(("model", "tokenizer"), [("spatio_temporal", "token_learner"), ("factorised_encoder", "ats")])
def test_video_models_export_without_video_data(composed, tmp_path: Path, capsys, model: str, tokenizer: str) -> None:
    target = [f"export.path={tmp_path / 'model'}", "export.format=torch_export"]
    method = [f"tokenizer={tokenizer}", "tokenizer.at=1", f"backbone.model={model}"]
    [path] = export.run(composed(*CLIPS, *method, *target, base="export"))
    assert torch.export.load(path).module()(torch.randn(5, 1, 4, 16, 16)).shape == (5, 10)
    shown = " ".join(capsys.readouterr().out.split())
    assert "clips (batch, channels, frames, height, width)" in shown
    assert "compared on random clips by 1, 2" in shown


@pytest.mark.slow
@pytest.mark.parametrize("model", get_args(Model))
def test_so_do_they_as_onnx(composed, tmp_path: Path, model: str) -> None:
    target = [f"export.path={tmp_path / 'model'}", "tokenizer.at=1", f"backbone.model={model}"]
    assert export.run(composed(*CLIPS, *target, base="export")) == [tmp_path / "model.onnx"]


def test_a_file_that_differs_is_not_written(plain_job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.pt2").write_text("what was there before")
    read = model_file.read
    monkeypatch.setattr(model_file, "read", lambda path: lambda images: read(path)(images).flip(1))
    with pytest.raises(FewtokensError, match="The torch_export file was not written"):
        export.run(plain_job())
    assert (tmp_path / "model.pt2").read_text() == "what was there before"
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt2", "run"}
    monkeypatch.undo()
    assert export.run(plain_job()) == [tmp_path / "model.pt2"]


@pytest.mark.parametrize("wrong", ["export.format=tensorrt", "export.format=[]", "export.num_images=0",
                                   "export.batch_size=0", "export.tolerance=0", "export.images=val",
                                   "export.max_mismatched=1", "export.path=.",
                                   "export.format=7", "export.path=7", "export.path=null", "export=null",
                                   "export.path=/dev/null/x/model"])  # fmt: skip
def test_a_wrong_setting_is_answered_with_a_sentence(plain_job, tmp_path: Path, wrong: str) -> None:
    with pytest.raises(FewtokensError, match=wrong.partition("=")[0]):
        export.run(plain_job(wrong))
    assert not (tmp_path / "run").exists()


def test_the_command_names_the_nearest_key_and_says_what_is_not_there(command) -> None:
    assert "Did you mean `export.format`" in command("fewtokens.runs.export", "export.fromat=onnx", code=1).stderr
    assert "/nowhere does not exist" in command("fewtokens.runs.export", "checkpoint=/nowhere", code=1).stderr


@pytest.mark.slow
def test_the_command_writes_into_its_run_directory(script, tmp_path: Path) -> None:
    done = script("fewtokens.runs.export", "tokenizer=ats", "backbone.pool=token", "export.num_images=5")
    (run,) = (tmp_path / "outputs" / "export" / "digits").iterdir()
    assert (run / "model.onnx").is_file()
    assert "python -m fewtokens.runs.export tokenizer=ats" in (run / "run.json").read_text()
    assert "INFO" not in done.stdout, "no chatter of other packages"
