"""A stopped and resumed run has the samples, the augmentation and the weights of an uninterrupted one."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from fewtokens.data.image.digits import Digits
from fewtokens.data.transforms.geometric import PadCrop, RandomFlip
from fewtokens.errors import FewtokensError

EPOCHS, BATCH = 3, 256  # 6 batches an epoch


class Probe(L.LightningModule):
    """Learns a little and remembers every batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(64, 10)
        self.seen: list[tuple[int, int, float, int]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        views, target = batch
        weight = torch.arange(views.numel(), dtype=torch.float64) % 997
        mark = float((views.double().flatten() * weight).sum())  # samples, their order, and their augmentation
        self.seen.append((self.current_epoch, index, mark, int((target * torch.arange(len(target))).sum())))
        return nn.functional.cross_entropy(self.head(views.flatten(1)), target)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        assert batch[0].shape[1:] == (1, 1, 8, 8)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Stop(L.Callback):
    """Writes a checkpoint in one hook at one step and then ends the run, as a kill would."""

    def __init__(self, path: Path, hook: str, step: int) -> None:
        self.path, self.step = path, step
        setattr(self, hook, self._save)

    def _save(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)
            raise Killed


class Killed(Exception):
    """Stands for the end of the process."""


def data(**changes: Any) -> Digits:
    settings = {"batch_size": BATCH, "seed": 3, "train_transforms": [PadCrop(1), RandomFlip()]} | changes
    return Digits(num_classes=10, image_size=8, channels=1, mean=[0.3], std=[0.4], **settings)


def fit(datamodule: Digits, callback: L.Callback | None = None, path: Path | None = None, **more: Any) -> Probe:
    model = Probe()
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback] if callback else [],
        num_sanity_val_steps=0,
        **more,
    )
    if callback is None:
        trainer.fit(model, datamodule, ckpt_path=path, weights_only=True)
        return model
    with pytest.raises(Killed):
        trainer.fit(model, datamodule)
    return model


POINTS = [
    ("on_train_batch_end", 1),
    ("on_train_batch_end", 8),
    ("on_train_batch_end", 6),  # the last batch of an epoch
    ("on_validation_end", 9),  # in the middle of an epoch
    ("on_validation_end", 12),  # at its end
    ("on_train_epoch_end", 6),
    ("on_train_epoch_end", 12),
    ("on_train_batch_start", 8),
]


@pytest.mark.parametrize(("hook", "step", "workers"), [(*point, 0) for point in POINTS] + [(*POINTS[1], 2)])
def test_resumed_run_equals_the_uninterrupted(tmp_path: Path, hook: str, step: int, workers: int) -> None:
    more = {"val_check_interval": 3}
    uninterrupted = fit(data(num_workers=workers), **more)
    assert [(epoch, index) for epoch, index, *_ in uninterrupted.seen] == [
        (e, i) for e in range(EPOCHS) for i in range(6)
    ]
    assert len({mark for _, _, mark, _ in uninterrupted.seen}) == len(uninterrupted.seen)
    path = tmp_path / "half.ckpt"
    half = fit(data(num_workers=workers), Stop(path, hook, step), **more)
    rest = fit(data(num_workers=workers), path=path, **more)
    assert half.seen + rest.seen == uninterrupted.seen
    assert torch.equal(rest.head.weight, uninterrupted.head.weight)


def test_resuming_in_mid_epoch_with_another_order_is_refused(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "half.ckpt"
    fit(data(), Stop(path, "on_train_batch_end", 8))
    with pytest.raises(FewtokensError, match="middle of an epoch with another order of samples"):
        fit(data(batch_size=128), path=path)
    read = Digits.read
    monkeypatch.setattr(Digits, "read", lambda self: {k: v.take(torch.arange(200)) for k, v in read(self).items()})
    with pytest.raises(FewtokensError, match=r"repeats 1 and 1297 samples, this run has .* and 200 samples"):
        fit(data(), path=path)


def test_a_second_fit_starts_at_its_own_beginning(tmp_path: Path) -> None:
    path = tmp_path / "half.ckpt"
    fit(data(), Stop(path, "on_train_batch_end", 8))
    same = data()
    fit(same, path=path)
    assert fit(same).seen == fit(data()).seen


def test_overfitting_a_few_batches_works() -> None:
    assert len(fit(data(), overfit_batches=2).seen) == 2 * EPOCHS


@pytest.mark.filterwarnings("error:You're resuming from a checkpoint")
def test_lightning_takes_the_loader_for_resumable(tmp_path: Path) -> None:
    path = tmp_path / "half.ckpt"
    fit(data(), Stop(path, "on_train_batch_end", 8))
    fit(data(), path=path)
