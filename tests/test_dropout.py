"""Dropout is a function of seed, step, row, layer and position, and of nothing else."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from macft.model.adapters.dropout import DropoutKeys, RowDropout


def mask(p: float, layer: int, keys: np.ndarray, length: int, features: int = 16) -> np.ndarray:
    shared = DropoutKeys()
    with shared.using(mx.array(keys)):
        return np.array(RowDropout(p, layer, shared)(mx.ones((len(keys), length, features))))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), step=st.integers(0, 10**6), longer=st.integers(0, 40))
def test_a_rows_mask_ignores_company_place_and_padding(seed: int, step: int, longer: int) -> None:
    ids = np.array([5, 17, 99])
    together = mask(0.4, 2, DropoutKeys.for_rows(seed, step, ids), 12 + longer)
    alone = mask(0.4, 2, DropoutKeys.for_rows(seed, step, ids[1:2]), 12)
    np.testing.assert_array_equal(together[1, :12], alone[0])


def test_masks_differ_by_row_step_seed_and_layer() -> None:
    row = np.array([3])
    base = mask(0.5, 0, DropoutKeys.for_rows(1, 1, row), 32)
    others = [
        mask(0.5, 0, DropoutKeys.for_rows(1, 1, np.array([4])), 32),
        mask(0.5, 0, DropoutKeys.for_rows(1, 2, row), 32),
        mask(0.5, 0, DropoutKeys.for_rows(2, 1, row), 32),
        mask(0.5, 1, DropoutKeys.for_rows(1, 1, row), 32),
    ]
    for other in others:
        assert 0.3 < np.mean(base == other) < 0.7


@pytest.mark.parametrize("p", [0.05, 0.3, 0.8])
def test_rate_and_scale(p: float) -> None:
    values = mask(p, 0, DropoutKeys.for_rows(0, 0, np.arange(8)), 128, 64)
    assert np.mean(values == 0) == pytest.approx(p, abs=0.01)
    assert values.max() == pytest.approx(1 / (1 - p))
    # No feature or position is favoured.
    assert np.mean(values == 0, axis=(0, 1)).std() < 0.05
    assert np.mean(values == 0, axis=(0, 2)).std() < 0.05
