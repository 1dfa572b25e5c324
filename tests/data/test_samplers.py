"""Sharding: every sample exactly once, in an order that depends only on (seed, epoch)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewtokens.data.samplers import EvalSampler, TrainSampler
from fewtokens.errors import FewtokensError

sizes, worlds = st.integers(8, 200), st.integers(1, 8)


@given(sizes, worlds)
def test_evaluation_sees_every_sample_once(size: int, world: int) -> None:
    seen = [index for rank in range(world) for index in EvalSampler(size, rank=rank, world=world)]
    assert sorted(seen) == list(range(size))


@given(sizes, worlds, st.integers(0, 5), st.integers(0, 5))
def test_training_ranks_are_disjoint_equal_and_repeatable(size: int, world: int, seed: int, epoch: int) -> None:
    def shards() -> list[list[int]]:
        return [
            list(TrainSampler(size, batch_size=4, seed=seed, rank=r, world=world, epoch=epoch)) for r in range(world)
        ]

    seen = shards()
    flat = [index for shard in seen for index in shard]
    assert {len(shard) for shard in seen} == {size // world}
    assert len(set(flat)) == len(flat)
    assert set(flat) <= set(range(size))
    assert seen == shards()


def test_epochs_and_seeds_differ() -> None:
    sampler = TrainSampler(50, batch_size=4, seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(TrainSampler(50, batch_size=4, seed=2)) != first


@given(st.integers(0, 12))
def test_skip_holds_for_its_epoch_alone_and_keeps_the_length(batches: int) -> None:
    full = {epoch: list(TrainSampler(50, batch_size=4, epoch=epoch)) for epoch in range(3)}
    sampler = TrainSampler(50, batch_size=4, epoch=1)
    sampler.skip(1, batches)
    assert list(sampler) == list(sampler) == full[1][4 * batches :]  # twice: Lightning may ask more than once
    assert len(sampler) == 50
    sampler.set_epoch(2)
    assert list(sampler) == full[2]


def test_stamps_carry_epoch_and_index() -> None:
    plain = list(TrainSampler(10, batch_size=2, epoch=3))
    assert [divmod(stamp, 10) for stamp in TrainSampler(10, batch_size=2, epoch=3, stamped=True)] == [
        (3, index) for index in plain
    ]


def test_fewer_samples_than_processes_are_refused() -> None:
    with pytest.raises(FewtokensError, match="4 processes need at least 4 training samples, got 3"):
        TrainSampler(3, batch_size=1, world=4)


@given(sizes, worlds, st.integers(1, 4))
def test_repeats_follow_each_other_with_epochs_of_their_own(size: int, world: int, repeats: int) -> None:
    settings = {"batch_size": 4, "world": world, "epoch": 2, "repeats": repeats}
    ranks = [list(TrainSampler(size, rank=r, stamped=True, **settings)) for r in range(world)]
    plain = [list(TrainSampler(size, rank=r, **settings)) for r in range(world)]
    assert [[stamp % size for stamp in rank] for rank in ranks] == plain
    stamps = [stamp for row in zip(*ranks, strict=True) for stamp in row]
    assert len(stamps) == len(set(stamps)) == size // world * world
    for start in range(0, len(stamps), repeats):
        group = stamps[start : start + repeats]
        assert len({stamp % size for stamp in group}) == 1
        assert [stamp // size for stamp in group] == [2 * repeats + copy for copy in range(len(group))]
