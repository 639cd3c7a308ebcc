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
from macft.parallel.shares import assign
from macft.training.settings import TrainingConfig, steps_for

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


@pytest.mark.slow
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


@settings(max_examples=60, deadline=None)
@given(
    sources=st.lists(st.tuples(st.integers(1, 30), st.floats(0.2, 5)), min_size=1, max_size=4),
    batch_size=st.integers(1, 12),
    seed=st.integers(0, 2**31),
)
def test_weighted_sources_fill_their_share_of_every_epoch(
    sources: list[tuple[int, float]], batch_size: int, seed: int
) -> None:
    sizes, weights = [size for size, _ in sources], [weight for _, weight in sources]
    total = sum(sizes)
    order = RowOrder(sizes, weights, batch_size=batch_size, seed=seed)
    stream = np.concatenate([order.rows(step) for step in range(-(-2 * total // batch_size))])[: 2 * total]
    starts = np.cumsum([0, *sizes])
    shares = [total * size * weight / sum(s * w for s, w in sources) for size, weight in sources]
    # A source whose share is less than a row gets one all the same, at the cost of the largest.
    slack = 1 if min(shares) >= 1 else len(sources)
    for source, size in enumerate(sizes):
        mine = (stream >= starts[source]) & (stream < starts[source + 1])
        first, second = mine[:total].sum(), mine[total:].sum()
        assert first == second
        assert first >= 1
        assert abs(first - shares[source]) < slack
        # Each source runs through all its rows before it repeats one.
        counts = np.bincount(stream[mine] - starts[source], minlength=size)
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("step", [10**6, 10**9, 10**12])
def test_a_step_far_ahead_is_had_directly(step: int) -> None:
    order = RowOrder([7, 5], [1.0, 2.0], batch_size=4, seed=1)
    rows = order.rows(step)
    assert rows.shape == (4,)
    assert set(rows.tolist()) <= set(range(12))
    np.testing.assert_array_equal(rows, RowOrder([7, 5], [1.0, 2.0], batch_size=4, seed=1).rows(step))


def test_a_batch_may_be_longer_than_the_dataset() -> None:
    rows = RowOrder([3], [1.0], batch_size=10, seed=0).rows(0)
    assert [sorted(rows[start : start + 3]) for start in (0, 3, 6)] == [[0, 1, 2]] * 3


def test_batch_size_cuts_the_same_stream_elsewhere() -> None:
    def stream(batch_size: int) -> list[int]:
        order = RowOrder([11, 6], [1.0, 3.0], batch_size=batch_size, seed=5)
        return np.concatenate([order.rows(step) for step in range(60 // batch_size)]).tolist()

    assert stream(1) == stream(4) == stream(15) == stream(60)


@pytest.mark.parametrize(
    ("rows", "batch", "epochs", "steps"), [(10, 4, 1, 3), (12, 4, 1, 3), (10, 3, 3, 10), (8, 4, 0.1, 1), (7, 7, 2, 2)]
)
def test_an_epoch_sees_every_row(rows: int, batch: int, epochs: float, steps: int) -> None:
    assert steps_for(TrainingConfig(epochs=epochs), rows / batch) == steps


def test_epochs_are_counted_in_batches() -> None:
    order = RowOrder([10], [1.0], batch_size=4, seed=0)
    assert order.steps_per_epoch == 2.5
    assert order.epoch_of(5) == 2.0


@settings(max_examples=150, deadline=None)
@given(lengths=st.lists(st.integers(1, 2000), max_size=40), world_size=st.integers(1, 8), data=st.data())
def test_no_rank_would_gain_by_handing_a_row_over(lengths: list[int], world_size: int, data: st.DataObject) -> None:
    shares = data.draw(st.none() | st.lists(st.floats(0.1, 10), min_size=world_size, max_size=world_size))
    places = assign(np.array(lengths, dtype=np.int64), world_size, shares)
    speeds = shares or [1.0] * world_size
    loads = [sum(lengths[i] for i in mine) for mine in places]
    for rank, mine in enumerate(places):
        assert mine.dtype == np.int64
        assert mine.tolist() == sorted(mine.tolist())
        if not len(mine):
            continue
        smallest = min(lengths[i] for i in mine)
        for other in range(world_size):
            if other != rank:
                assert loads[rank] / speeds[rank] <= (loads[other] + smallest) / speeds[other] * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 99), max_size=20), world_size=st.integers(1, 6), scale=st.sampled_from([2, 0.5]))
def test_only_the_ratio_of_shares_counts(lengths: list[int], world_size: int, scale: float) -> None:
    shares = [1.0 + rank for rank in range(world_size)]
    left = assign(np.array(lengths, dtype=np.int64), world_size, shares)
    right = assign(np.array(lengths, dtype=np.int64), world_size, [share * scale for share in shares])
    assert [mine.tolist() for mine in left] == [mine.tolist() for mine in right]


@pytest.mark.parametrize("shares", [[1.0], [0.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, 1.0, 1.0]])
def test_shares_must_fit_the_ranks(shares: list[float]) -> None:
    with pytest.raises(ValueError, match="one share of 0 or more for each rank"):
        assign(np.array([3, 4]), 2, shares)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(2, 200), min_size=1, max_size=20), size=st.integers(1, 6))
def test_micro_batches_hold_rows_of_like_length(lengths: list[int], size: int) -> None:
    rows = [Row(np.ones(length, np.int32), 0) for length in lengths]
    batches = micro_batches(rows, np.arange(len(rows)), size)
    assert [length for batch in batches for length in batch.lengths.tolist()] == sorted(lengths)
    # Only the last batch may be short, so that there are as few as can be.
    assert len(batches) == -(-len(lengths) // size)


def test_micro_batches_depend_on_row_numbers_not_on_places() -> None:
    rows = [Row(np.full(5, value, np.int32), 0) for value in (3, 1, 2)]
    ids = np.array([3, 1, 2])
    turned = [2, 0, 1]
    left = micro_batches(rows, ids, 2)
    right = micro_batches([rows[i] for i in turned], ids[turned], 2)
    for one, other in zip(left, right, strict=True):
        np.testing.assert_array_equal(one.row_ids, other.row_ids)
        np.testing.assert_array_equal(one.tokens, other.tokens)


def test_no_rows_make_no_batches() -> None:
    assert micro_batches([], np.array([], dtype=np.int64), None) == []
    assert micro_batches([], np.array([], dtype=np.int64), 3) == []
