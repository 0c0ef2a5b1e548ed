"""Every document lies in exactly one row, no row overflows, and the plan depends on lengths and seed alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3_lightning.data.packing import pack, plan_batches, sample_mixture

LENGTHS = st.lists(st.integers(1, 64), max_size=200).map(lambda lengths: np.array(lengths, dtype=np.int64))


@given(LENGTHS)
def test_rows_hold_whole_documents_once(lengths: np.ndarray) -> None:
    rows = pack(lengths, 64)
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    assert all(lengths[row].sum() <= 64 for row in rows)
    assert sum(sorted(lengths[row].sum() for row in rows)[:2]) > 64 or len(rows) < 2  # no two rows fit into one


@given(LENGTHS)
def test_packing_is_best_fit_decreasing(lengths: np.ndarray) -> None:
    """The result equals that of the textbook's quadratic loop."""
    spaces: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [space for space in spaces if space >= length]
        if fitting:
            spaces.remove(min(fitting))
        spaces.append((min(fitting) if fitting else 64) - length)
    assert sorted(64 - lengths[row].sum() for row in pack(lengths, 64)) == sorted(spaces)


@given(LENGTHS, st.integers(1, 5), st.sampled_from([None, 64]), st.sampled_from([None, 3]), st.sampled_from([None, 20]))
def test_a_plan_has_every_document_once(
    lengths: np.ndarray, batch_size: int, capacity: int | None, seed: int | None, length_boundary: int | None
) -> None:
    plan = plan_batches(lengths, batch_size=batch_size, capacity=capacity, seed=seed, length_boundary=length_boundary)
    batches = [plan[index] for index in range(len(plan))]
    assert sorted(document for batch in batches for row in batch for document in row) == list(range(len(lengths)))
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        long = {bool(lengths[document] > (length_boundary or 64)) for row in batch for document in row}
        assert len(long) == 1  # long and short documents never meet


def test_plans_differ_by_seed_and_are_the_same_for_the_same() -> None:
    lengths = np.arange(1, 60)
    plans = [plan_batches(lengths, batch_size=4, capacity=64, seed=seed).fingerprint() for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]


def test_rows_of_a_batch_have_similar_lengths() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 2560)
    plan = plan_batches(lengths, batch_size=4, capacity=None, seed=0)
    longest = sum(4 * max(lengths[row].sum() for row in plan[index]) for index in range(len(plan)))
    assert lengths.sum() / longest > 0.95


def test_packing_a_million_lengths_fills_99_percent() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 1, 1_000_000).astype(np.int64).clip(1, 2048)
    rows = pack(lengths, 2048)
    assert lengths.sum() / (len(rows) * 2048) > 0.99


@pytest.mark.parametrize("capacity", [None, 8])
def test_no_documents_make_no_batches(capacity: int | None) -> None:
    assert len(plan_batches(np.array([], dtype=np.int64), batch_size=2, capacity=capacity, seed=0)) == 0


@given(LENGTHS, st.integers(64, 300), st.sampled_from([None, 3]), st.sampled_from([None, 64]))
def test_batches_hold_at_most_max_tokens_per_batch(
    lengths: np.ndarray, max_tokens: int, seed: int | None, capacity: int | None
) -> None:
    plan = plan_batches(lengths, batch_size=1, max_tokens=max_tokens, capacity=capacity, seed=seed)
    batches = [plan[index] for index in range(len(plan))]
    assert sorted(document for batch in batches for row in batch for document in row) == list(range(len(lengths)))
    assert all(len(batch) * max(lengths[row].sum() for row in batch) <= max_tokens for batch in batches)


def test_a_mixture_takes_as_many_documents_as_the_shares_allow() -> None:
    items = np.array([0] * 100 + [1] * 10 + [2] * 50)
    chosen = sample_mixture(items, [2.0, 1.0, 1.0], seed=0)
    assert np.bincount(items[chosen]).tolist() == [20, 10, 10]
    assert len(set(chosen.tolist())) == 40
    assert chosen.tolist() == sample_mixture(items, [4.0, 2.0, 2.0], seed=0).tolist()
    assert chosen.tolist() != sample_mixture(items, [2.0, 1.0, 1.0], seed=1).tolist()
