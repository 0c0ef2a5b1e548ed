"""Every batch comes once an epoch, whatever the ranks; place and order follow from numbers alone."""

import time

import pytest

from phi3_lightning.data.sampler import FILLER, BatchOrder


def order(count: int, *, epoch: int = 0, seed: int = 0, shuffle: bool = True, **options: object) -> list[int]:
    sampler = BatchOrder(range(count), seed=seed, shuffle=shuffle, **options)  # type: ignore[arg-type]
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("shuffle", [True, False])
def test_each_batch_once_over_all_ranks(ranks: int, shuffle: bool) -> None:
    per_rank = [order(10, shuffle=shuffle, num_replicas=ranks, rank=rank) for rank in range(ranks)]
    assert len({len(own) for own in per_rank}) == 1
    seen = [index for own in per_rank for index in own]
    assert sorted(index for index in seen if index != FILLER) == list(range(10))


def test_order_differs_by_epoch_and_seed_and_is_reproducible() -> None:
    assert order(50) == order(50)
    assert order(50) != order(50, epoch=1)
    assert order(50) != order(50, seed=1)
    assert order(5, shuffle=False) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("position", [0, 1, 4, 5])
def test_an_epoch_goes_on_where_it_stopped(ranks: int, position: int) -> None:
    for rank in range(ranks):
        whole = order(9, epoch=2, num_replicas=ranks, rank=rank)
        rest = order(9, epoch=2, num_replicas=ranks, rank=rank, position=lambda: position)
        assert rest == whole[position:]


def test_a_far_position_costs_nothing() -> None:
    start = time.perf_counter()
    assert len(order(1_000_010, position=lambda: 1_000_000)) == 10
    assert time.perf_counter() - start < 1


def test_the_length_is_the_whole_epochs() -> None:
    assert len(BatchOrder(range(9), seed=0, shuffle=True, num_replicas=2, rank=1, position=lambda: 3)) == 5
