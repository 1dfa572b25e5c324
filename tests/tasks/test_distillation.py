"""Distillation: every loss against its formula, and what a teacher leaves alone."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import TINY
from fewtokens.backbones.pretrained import timm_vit
from fewtokens.backbones.vit import ViT
from fewtokens.backbones.vivit import PLAIN
from fewtokens.errors import FewtokensError
from fewtokens.runs import eval as evaluation
from fewtokens.runs import teacher as teachers
from fewtokens.runs import train as training
from fewtokens.tasks.classification import Classifier
from fewtokens.tasks.distillation import Distillation, recorded
from fewtokens.tokenizers.dynamic_vit import DynamicViT
from fewtokens.tokenizers.evit import EViT
from fewtokens.tokenizers.sit import SiT
from fewtokens.tokenizers.tome import ToMe
from small_models import small

IMAGES, LABELS = torch.randn(4, 3, 8, 12), torch.tensor([0, 1, 2, 3])


def task(model: nn.Module, teacher: nn.Module, **settings) -> Classifier:
    distillation = Distillation(**settings)
    distillation.connect(model, teacher)
    made = Classifier(model, 5, partial(torch.optim.SGD, lr=0.1), distillation=distillation)
    made.log = lambda *a, **k: None  # type: ignore[method-assign, assignment]
    return made


def loss_of(made: Classifier) -> torch.Tensor:
    torch.manual_seed(3)  # DynamicViT samples
    return made.training_step((IMAGES[:, None], LABELS), 0)


def other(build=None, at=()) -> ViT:
    """Return a model with other weights than `small()`."""
    model = small(**({} if build is None else {"build": build, "at": at}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("hard", [True, False])
def test_logits_are_compared_as_in_the_paper(hard: bool) -> None:
    student, teacher = small(), other()
    made = task(student, teacher, labels=0.3, logits=0.7, hard=hard, temperature=3.0)
    logits, target = student(IMAGES), teacher(IMAGES)
    if hard:
        expected = F.cross_entropy(logits, target.argmax(dim=1))
    else:
        p, q = (target / 3).softmax(dim=1), (logits / 3).softmax(dim=1)
        expected = 9 * (p * (p / q).log()).sum(dim=1).mean()
    torch.testing.assert_close(loss_of(made), 0.3 * F.cross_entropy(logits, LABELS) + 0.7 * expected)


def test_a_copy_teaches_nothing() -> None:
    student = small(SiT, at=[1])
    made = task(small(), small(), labels=0.0, logits=1.0, hard=False, tokens=1.0)
    assert loss_of(made).item() == pytest.approx(0.0, abs=1e-6)
    assert task(student, small(), labels=1.0, logits=0.0).distillation.teacher is not student


def test_kept_tokens_are_those_of_the_keep_mask_after_the_last_norm() -> None:
    student, teacher = small(partial(DynamicViT, keep_rate=0.5), at=[1]).train(), other()
    made = task(student, teacher, labels=0.0, logits=0.0, tokens=1.0)
    torch.manual_seed(3)
    with recorded(student) as own:
        student(IMAGES)
    ratio = next(t for t in student.encoder.tokenizers if isinstance(t, DynamicViT)).loss()
    with recorded(teacher) as theirs:
        teacher(IMAGES)
    kept = own[-1].keep_mask[:, 1:] > 0
    assert 0 < kept.sum() < kept.numel()
    mine, their = (m.vit.norm(t[-1].x)[:, 1:][kept] for m, t in ((student, own), (teacher, theirs)))
    torch.testing.assert_close(loss_of(made), F.mse_loss(mine, their) + ratio)


def test_recalibrated_tokens_are_compared_after_every_block() -> None:
    student, teacher = small(partial(SiT, num_tokens=0.5), at=[1]), other()
    made = task(student, teacher, labels=0.0, logits=0.0, tokens=2.0, match=r"recalibrated")
    modules = made.distillation.recalibrations
    assert [type(module).__name__ for module in modules] == ["Identity", "Recalibration", "Recalibration"]
    with recorded(student) as own, recorded(teacher) as theirs:
        student(IMAGES)
        teacher(IMAGES)
    assert [tokens.num_patches for tokens in own] == [24, 12, 12]
    expected = sum(F.mse_loss(m(a.patches), b.patches) for m, a, b in zip(modules, own, theirs, strict=True)) / 3
    loss = loss_of(made)
    torch.testing.assert_close(loss, 2 * expected)
    loss.backward()
    assert all(p.grad is not None for p in modules.parameters())
    assert all(p.grad is not None for n, p in student.encoder.named_parameters() if "layers.2.block.norm" in n)
    made.trainer = type("Trainer", (), {"estimated_stepping_batches": 4})()
    groups = made.configure_optimizers()["optimizer"].param_groups
    assert sorted({round(group["lr"], 3) for group in groups}) == [0.1, 0.5]
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(p.numel() for p in made.parameters())


def test_a_distilled_deit_learns_with_two_heads() -> None:
    student = timm_vit(name="deit_tiny_distilled_patch16_224", image_size=32, num_classes=5, tokenizer=PLAIN)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5))
    images = torch.randn(4, 3, 32, 32)
    made = task(student, teacher)
    loss = made.distillation(student, made._logits, images, partial(made._loss, target=LABELS))
    tokens = student.vit.norm(student.encoder(student.embed(images)).x)
    labels, compared = student.vit.head(tokens[:, 0]), student.vit.head_dist(tokens[:, 1])
    expected = F.cross_entropy(labels, LABELS) + F.cross_entropy(compared, teacher(images).argmax(dim=1))
    torch.testing.assert_close(loss, expected / 2)


def test_the_teacher_is_frozen_and_not_saved() -> None:
    teacher = other().train()
    before = copy.deepcopy(teacher.state_dict())
    made = task(small(), teacher, tokens=0.5)
    loss_of(made).backward()
    assert not teacher.training
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert not [name for name in made.state_dict() if "teacher" in name or name.startswith("distillation")]
    assert {id(p) for p in made.parameters()} == {id(p) for p in made.model.parameters()}
    plain = Classifier(small(), 5, partial(torch.optim.SGD, lr=0.1), distillation=Distillation())
    plain.log = lambda *a, **k: None  # type: ignore[method-assign, assignment]
    torch.testing.assert_close(loss_of(plain), F.cross_entropy(plain.model(IMAGES), LABELS)), "without a teacher"


@pytest.mark.parametrize(
    ("student", "teacher", "settings", "says"),
    [
        (small, partial(small, num_classes=6), {}, "The teacher must have the classes of the data, which are 5"),
        (small, partial(small, dim=8), {"tokens": 1.0}, r"which are \(16, 3, 24\), got \(8, 3, 24\)"),
        (small, lambda: nn.Flatten(), {"tokens": 1.0}, "the teacher must be a ViT"),
        (partial(small, partial(EViT, keep_rate=0.5), at=[1]), small, {"tokens": 1.0}, "the method leaves 13"),
        (partial(small, partial(ToMe, r=2), at=[1]), small, {"tokens": 1.0, "match": "recalibrated"}, "got ToMe"),
        (small, small, {"match": "all"}, "`task.distillation.match` must be 'kept' or 'recalibrated'"),
        (small, small, {"logits": -1.0}, "`task.distillation.logits` must be a number >= 0"),
    ],
)
def test_what_does_not_fit_is_an_error(student, teacher, settings, says: str) -> None:
    with pytest.raises(FewtokensError, match=says):
        loss_of(task(student().train(), teacher(), **settings))


def test_a_run_is_the_teacher_of_another(composed, tmp_path: Path) -> None:
    dense = ["tokenizer=none", "tokenizer.at=[]", "backbone.pool=token", "test=false"]
    training.run(composed(*TINY, *dense, directory="teacher"))
    tokens = ["task.distillation.tokens=0.5", "task.distillation.hard=false", "task.distillation.labels=1.0"]
    student = [*TINY, "backbone.pool=token", "tokenizer=dynamic_vit", f"task.teacher={tmp_path / 'teacher'}", *tokens]
    cfg = composed(*student, "callbacks=ema", directory="student")
    numbers = training.run(cfg)
    assert numbers["teacher/gmacs"] > 0
    assert numbers["teacher/params"] == sum(
        p.numel() for p in teachers.load(str(tmp_path / "teacher"), cfg).parameters()
    )
    saved = torch.load(tmp_path / "student" / "checkpoints" / "last.ckpt", weights_only=True)
    assert not [name for name in saved["state_dict"] if not name.startswith(("model.", "train_", "val", "test"))]
    found = evaluation.run(
        composed(f"checkpoint={tmp_path / 'student'}", "measure=none", base="eval", directory="eval")
    )
    assert found["test/top1"] == numbers["test/top1"]


def test_a_file_of_weights_is_the_teacher_for_the_same_backbone(composed, tmp_path: Path) -> None:
    cfg = composed("backbone=vit_mini", "backbone.dim=16", "backbone.heads=2", "backbone.depth=2")
    model = teachers._backbone(cfg.backbone, tokenizer=teachers.DENSE)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    cfg = composed("backbone=vit_mini", "backbone.dim=16", "backbone.heads=2", "backbone.depth=2", "tokenizer=tome")
    found = teachers.load(str(tmp_path / "weights.pt"), cfg)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in found.state_dict().items())
    assert not found.encoder.tokenizers[0].adaptive
    torch.save({"head.weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(FewtokensError, match=r"does not hold the weights of the backbone without a tokenizer"):
        teachers.load(str(tmp_path / "other.pt"), cfg)
    with pytest.raises(FewtokensError, match=r"`task.teacher` must be a run directory"):
        teachers.load(str(tmp_path / "nothing"), cfg)


def test_a_model_of_timm_is_the_teacher(composed, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(teachers, "create", lambda name, pretrained: asked.append((name, pretrained)) or nn.Flatten())
    monkeypatch.setattr(teachers, "timm_vit", lambda **settings: asked.append(settings) or small())
    cfg = composed("data=imagenet")
    teachers.load("timm:regnety_160.deit_in1k", cfg)
    teachers.load("timm:deit_small_patch16_224", cfg, needs_tokens=True)
    assert asked[0] == ("regnety_160.deit_in1k", True)
    assert (asked[1]["name"], asked[1]["num_classes"], asked[1]["image_size"]) == ("deit_small_patch16_224", 1000, 224)


def test_several_labels_have_no_teacher(composed) -> None:
    with pytest.raises(FewtokensError, match=r"`task.teacher` must be null with task=multilabel"):
        teachers.instantiate(composed("task=multilabel", "task.teacher=a").task)
    with pytest.raises(FewtokensError, match=r"`task.compile` must be none with task.distillation.tokens"):
        teachers.instantiate(composed("task.teacher=a", "task.distillation.tokens=1.0", "task.compile=layers").task)
