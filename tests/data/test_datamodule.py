"""Loaders, sharding over the ranks of the trainer, draws per rank and step, and the configurations."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import lightning as L
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from fewtokens.data.datamodule import Loader
from fewtokens.data.image.cifar10 import Cifar10
from fewtokens.data.image.digits import Digits
from fewtokens.data.image.imagenet import ImageNet
from fewtokens.data.image.in_memory import Samples, hold_out
from fewtokens.data.transforms.geometric import PadCrop, RandomCrop, RandomFlip, Resize
from fewtokens.errors import FewtokensError

CONFIGS = Path(__file__).parents[2] / "configs" / "data"


def digits(**changes: Any) -> Digits:
    settings = {"num_classes": 10, "image_size": 8, "channels": 1, "batch_size": 64} | changes
    found = Digits(**settings)
    found.setup()
    return found


def rank(number: int, world: int, epoch: int = 0, batch: int = 0) -> Any:
    """A trainer in the middle of training, with what a datamodule reads of it."""
    counters = SimpleNamespace(ready=batch, processed=batch, completed=batch, started=batch)
    epochs = SimpleNamespace(current=SimpleNamespace(processed=epoch, started=epoch + 1))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(current=counters)))
    loop.epoch_progress = epochs
    return Mock(
        spec=L.Trainer,
        global_rank=number,
        world_size=world,
        training=True,
        fit_loop=loop,
        current_epoch=epoch,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_yield_stored_images(workers: int) -> None:
    found = digits(num_workers=workers, eval_batch_size=150)
    batches = list(found.train_dataloader())
    assert len(batches) == len(found.train_dataloader()) == 21
    assert sum(len(targets) for _, targets in batches) == 1297
    assert batches[0][0].shape == (64, 1, 8, 8)
    assert [b[0].dtype for b in batches[:1]] + [b[1].dtype for b in batches[:1]] == [torch.uint8, torch.int64]
    assert [len(t) for _, t in found.val_dataloader()] == [150, 50]
    assert torch.equal(torch.cat([t for _, t in found.test_dataloader()]), found.dataset("test").samples.targets)


def test_ranks_of_the_trainer_share_the_samples() -> None:
    train, test = [], []
    for number in range(3):
        found = digits()
        found.trainer = rank(number, 3)
        train.append(list(found.train_dataloader().sampler))
        test += list(found.test_dataloader().sampler)
    assert len({index for shard in train for index in shard}) == 3 * (1297 // 3)
    assert sorted(test) == list(range(300))


def test_draws_depend_on_seed_rank_epoch_and_batch() -> None:
    def views(seed: int = 0, **where: int) -> torch.Tensor:
        found = digits(seed=seed, train_transforms=[PadCrop(2), RandomFlip()])
        batch = (found.dataset("train").samples.images[:64], found.dataset("train").samples.targets[:64])
        found.trainer = rank(where.get("number", 0), 2, where.get("epoch", 0), where.get("batch", 0))
        return found.on_after_batch_transfer(batch, 0)[0]

    assert torch.equal(views(), views())
    others = [views(seed=1), views(number=1), views(epoch=1), views(batch=1)]
    assert not any(torch.equal(views(), other) for other in others)


def test_loading_leaves_the_global_generator_alone() -> None:
    found = digits(train_transforms=[PadCrop(2)])
    before = torch.get_rng_state()
    found.on_after_batch_transfer(next(iter(found.train_dataloader())), 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_image_size_is_what_the_model_gets() -> None:
    both = {"train_transforms": [Resize(13), RandomCrop(12)], "eval_transforms": [Resize(13), Resize(12)]}
    digits(image_size=12, **both)
    with pytest.raises(FewtokensError, match=r"Set data\.image_size=12"):
        digits(**both)
    with pytest.raises(FewtokensError, match=r"in the val part, got 12"):
        digits(image_size=12, train_transforms=both["train_transforms"])


def test_gray_values_can_be_repeated() -> None:
    assert digits(channels=3).dataset("train").samples.images.shape[1] == 3


def test_digits_are_enlarged_once_and_stay_the_same_pictures() -> None:
    small, large = (part.dataset("test").samples for part in (digits(), digits(image_size=32, side=32)))
    assert large.images.shape == (300, 1, 32, 32)
    assert (large.images.dtype, large.targets.tolist()) == (torch.uint8, small.targets.tolist())
    assert small.images[:, 0].unique().tolist() == [
        round(255 / 16 * value) for value in range(17)
    ]  # as they are stored
    original = small.images.float()
    reduced = torch.nn.functional.avg_pool2d(large.images.float(), 4)
    assert (reduced - original).abs().mean() < 15
    assert (reduced - original.flip(0)).abs().mean() > 50
    with pytest.raises(FewtokensError, match=r"`data\.side` must be an int >= 1, got 0"):
        digits(side=0)


def test_drop_last_needs_a_whole_batch() -> None:
    assert [len(t) for _, t in digits(drop_last=True).train_dataloader()] == [64] * 20
    with pytest.raises(FewtokensError, match=r"`data\.batch_size` must be at most 1297"):
        digits(drop_last=True, batch_size=2000).train_dataloader()


def test_wrong_number_of_classes_is_refused() -> None:
    with pytest.raises(FewtokensError, match=r"`data\.num_classes` must be 10, .*got 7"):
        digits(num_classes=7)


def test_a_loader_raises_the_error_of_its_workers() -> None:
    error = FewtokensError("A message of a worker.")

    class Bad(list):
        def __getitems__(self, _: list[int]) -> FewtokensError:
            return error

    with pytest.raises(FewtokensError, match=r"^A message of a worker\.$"):
        next(iter(Loader(Bad([1, 2]), collate_fn=lambda batch: batch, num_workers=1)))


def test_held_out_samples_are_stratified_and_exact() -> None:
    targets = torch.tensor([0] * 50 + [1] * 30 + [2] * 7)
    samples = Samples(torch.arange(87).view(-1, 1, 1, 1).to(torch.uint8), targets)
    rest, held = hold_out(samples, 20, seed=0)
    assert torch.bincount(held.targets).tolist() == [11, 7, 2]
    together = torch.cat([rest.images, held.images]).flatten()
    assert sorted(together.tolist()) == list(range(87))
    with pytest.raises(FewtokensError, match=r"`data\.split_seed` must be an int >= 0, got -1"):
        hold_out(samples, 20, seed=-1)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_configurations_build_their_datamodules(path: Path, tmp_path: Path) -> None:
    if path.stem not in ("digits", "cifar10", "imagenet"):
        pytest.skip("tested with its own data set")
    config = OmegaConf.create({"seed": 5, "paths": {"data": str(tmp_path)}, "data": OmegaConf.load(path)})
    found = instantiate(config.data)
    assert found.seed == 5
    for fact in ("num_classes", "image_size", "channels", "frames"):
        assert getattr(found, fact) == config.data[fact]
    assert found.train_pipeline.before == [] or path.stem != "imagenet"


def test_class_names_are_those_of_the_data(tmp_path: Path) -> None:
    assert list(Digits(num_classes=10, image_size=8, channels=1, batch_size=4).class_names) == list("0123456789")
    for name in ("n01440764", "n01443537"):
        for part in ("train", "val"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (40, 40)).save(tmp_path / part / name / "0.png")
    settings = {"image_size": 32, "batch_size": 1}
    known = ImageNet(tmp_path, num_classes=2, **settings)
    known.setup()
    assert [name.partition(",")[0] for name in known.class_names] == ["tench", "goldfish"]
    everything = ImageNet(tmp_path, num_classes=1000, **settings)
    everything.setup()
    assert len(everything.class_names) == 1000
    assert everything.class_names[:2] == known.class_names
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "cifar" / part / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(tmp_path / "cifar" / part / name / "0.png")
    assert list(Cifar10(tmp_path / "cifar", num_classes=2, **settings).class_names) == ["cat", "dog"]
    assert Cifar10(tmp_path / "nowhere", num_classes=10, **settings).class_names[3] == "cat"


def test_there_are_no_more_workers_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Digits(num_classes=10, image_size=8, channels=1, batch_size=4, num_workers=8)
    data.setup()
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})
    assert data.train_dataloader().num_workers == 2
    data.num_workers = 0
    assert data.train_dataloader().num_workers == 0
