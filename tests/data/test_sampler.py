"""Every batch comes once per epoch, whatever the ranks; position and order follow from numbers alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3_lightning.data.sampler import FILLER, BatchOrder, RankAssignment


def order(count: int, *, epoch: int = 0, seed: int = 0, shuffle: bool = True, **options: object) -> list[int]:
    sampler = BatchOrder(range(count), seed=seed, shuffle=shuffle, **options)  # type: ignore[arg-type]
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("shuffle", [True, False])
def test_each_batch_comes_once_over_all_ranks(ranks: int, shuffle: bool) -> None:
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
def test_an_epoch_resumes_at_its_position(ranks: int, position: int) -> None:
    for rank in range(ranks):
        whole = order(9, epoch=2, num_replicas=ranks, rank=rank)
        rest = order(9, epoch=2, num_replicas=ranks, rank=rank, position=lambda: position)
        assert rest == whole[position:]


def test_a_long_epoch_resumes_near_its_end() -> None:
    assert len(order(1_000_010, position=lambda: 1_000_000)) == 10


def test_the_length_is_that_of_the_whole_epoch() -> None:
    assert len(BatchOrder(range(9), seed=0, shuffle=True, num_replicas=2, rank=1, position=lambda: 3)) == 5


@settings(deadline=None)
@given(
    count=st.integers(1, 60),
    stages=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 4), st.integers(0, 6)), min_size=1, max_size=4),
)
def test_whatever_the_ranks_become_each_batch_comes_once(count: int, stages: list[tuple[int, int, int]]) -> None:
    """A stage of an epoch: its ranks, batches per accumulation window, and windows until the next restart."""
    order, seen, position = np.random.default_rng(1).permutation(count), [], 0
    shares = RankAssignment(count, stages[0][0])
    for ranks, window, windows in [*stages, (2, 1, 10_000)]:
        now = shares.go_on(ranks, 0, position, window)
        if now is not shares:
            shares, position = now, now.begin
        end = min(position + window * windows, shares.length)
        taken = [shares.of(rank, order, position)[: end - position] for rank in range(ranks)]
        assert len({len(own) for own in taken}) == 1
        seen += [index for own in taken for index in own if index != FILLER]
        position = end
        assert len(seen) == shares.seen(position)
    assert sorted(seen) == list(range(count))


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 5), (4, 3)])
@pytest.mark.parametrize("window", [1, 2, 4])
def test_no_window_is_without_a_batch_after_a_change_of_ranks(before: int, after: int, window: int) -> None:
    order = np.arange(83)
    for position in range(window, 83 // before - window, window):
        shares = RankAssignment(83, before).go_on(after, 0, position, window)
        assert shares.resumed is not None
        left = [shares.of(rank, order, shares.resumed.position) for rank in range(after)]
        filled = [any(own[step] != FILLER for own in left) for step in range(len(left[0]))]
        assert all(any(filled[start : start + window]) for start in range(0, len(filled), window))


def test_the_same_ranks_and_windows_change_nothing() -> None:
    shares = RankAssignment(20, 2)
    assert shares.go_on(2, 0, 4, 4) is shares
    assert shares.go_on(2, 0, 10, 4) is shares  # the short window at the end
