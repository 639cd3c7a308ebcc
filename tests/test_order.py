"""Which rows a step has, who computes them, and how they are padded."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from macft.data.batch import PAD_TO, collate, micro_batches
from macft.data.formats import Row
from macft.data.order import RowOrder
from macft.plan.shares import assign

ORDERS = st.tuples(st.lists(st.integers(1, 30), min_size=1, max_size=3), st.integers(1, 12), st.integers(0, 99))


@settings(max_examples=60, deadline=None)
@given(order=ORDERS, steps=st.lists(st.integers(0, 200), min_size=1, max_size=8))
def test_a_steps_rows_are_a_pure_function(order: tuple[list[int], int, int], steps: list[int]) -> None:
    sizes, batch_size, seed = order
    used = RowOrder(sizes, [1.0] * len(sizes), batch_size=batch_size, seed=seed)
    for step in steps:
        fresh = RowOrder(sizes, [1.0] * len(sizes), batch_size=batch_size, seed=seed)
        rows = used.rows(step)
        assert rows.shape == (batch_size,)
        assert rows.dtype == np.int64
        np.testing.assert_array_equal(rows, fresh.rows(step))


@settings(max_examples=60, deadline=None)
@given(order=ORDERS)
def test_every_epoch_has_each_row_once(order: tuple[list[int], int, int]) -> None:
    sizes, batch_size, seed = order
    total = sum(sizes)
    rows = RowOrder(sizes, [1.0] * len(sizes), batch_size=batch_size, seed=seed)
    stream = np.concatenate([rows.rows(step) for step in range(-(-3 * total // batch_size))])
    for epoch in range(3):
        assert sorted(stream[epoch * total : (epoch + 1) * total]) == list(range(total))


def test_epochs_and_seeds_differ() -> None:
    def first(seed: int, step: int) -> list[int]:
        return RowOrder([50], [1.0], batch_size=50, seed=seed).rows(step).tolist()

    assert len({tuple(first(seed, step)) for seed in (0, 1) for step in (0, 1)}) == 4


def test_weights_are_sampling_proportions() -> None:
    order = RowOrder([30, 60], [4.0, 1.0], batch_size=45, seed=3)
    counts = Counter(np.concatenate([order.rows(step) for step in range(20)]).tolist())
    light, heavy = [counts[i] for i in range(30, 90)], [counts[i] for i in range(30)]
    assert sum(heavy) == 2 * sum(light)
    # No row is skipped for long: within a source, counts differ by one pass at most.
    assert max(heavy) - min(heavy) <= 1
    assert max(light) - min(light) <= 1


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=40),
    world_size=st.integers(1, 8),
    data=st.data(),
)
def test_every_row_is_computed_by_exactly_one_rank(lengths: list[int], world_size: int, data: st.DataObject) -> None:
    shares = data.draw(st.none() | st.lists(st.floats(0.1, 5), min_size=world_size, max_size=world_size))
    places = assign(np.array(lengths), world_size, shares)
    assert sorted(np.concatenate(places).tolist()) == list(range(len(lengths)))
    if shares is None and len(lengths) >= world_size:
        assert all(len(mine) for mine in places)
    if shares is None:
        loads = [sum(lengths[i] for i in mine) for mine in places]
        assert max(loads) - min(loads) <= max(lengths)


def test_a_rank_twice_as_fast_gets_twice_the_tokens() -> None:
    fast, slow = assign(np.full(300, 10), 2, [2.0, 1.0])
    assert len(fast) == 200
    assert len(slow) == 100


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 90), min_size=1, max_size=12),
    size=st.none() | st.integers(1, 5),
    seed=st.integers(0, 9),
)
def test_micro_batches_hold_each_row_whole(lengths: list[int], size: int | None, seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows = [
        Row(generator.integers(1, 99, length).astype(np.int32), int(generator.integers(0, length)))
        for length in lengths
    ]
    ids = generator.permutation(1000)[: len(rows)]
    found = {}
    for batch in micro_batches(rows, ids, size):
        assert size is None or len(batch.row_ids) <= size
        assert (batch.tokens.shape[1] - 1) % PAD_TO == 0
        for place, row_id in enumerate(batch.row_ids):
            length = batch.lengths[place]
            assert not batch.tokens[place, length:].any()
            found[int(row_id)] = (batch.tokens[place, :length].tolist(), int(batch.prompt_lengths[place]))
    assert found == {int(i): (row.tokens.tolist(), row.prompt_length) for i, row in zip(ids, rows, strict=True)}


def test_a_row_always_fits_with_all_its_targets() -> None:
    for length in range(2, 3 * PAD_TO):
        batch = collate([Row(np.ones(length, np.int32), 0)], np.array([0]))
        assert length <= batch.tokens.shape[1] < length + PAD_TO


@pytest.mark.parametrize("bad", [([], []), ([0], [1.0]), ([3], [0.0]), ([3, 3], [1.0])])
def test_nonsense_is_refused(bad: tuple[list[int], list[float]]) -> None:
    with pytest.raises(ValueError, match="rows and a weight"):
        RowOrder(*bad, batch_size=1, seed=0)
