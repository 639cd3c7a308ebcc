"""Shares follow speed and heat, and are the same on every rank."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from macft.parallel.balance import ShareBalancer
from macft.parallel.node_status import REASONS, NodeStatus
from macft.parallel.shares import assign

numbers = st.none() | st.floats(-1e6, 1e6)
statuses = st.builds(
    NodeStatus,
    tokens=st.integers(0, 10**9),
    busy_seconds=st.floats(0, 1e6),
    duty=st.floats(0.02, 1),
    paused=st.booleans(),
    reason=st.sampled_from(REASONS),
    temperature=numbers,
    state=st.none() | st.integers(0, 4),
    watts=numbers,
    peak_watts=numbers,
    joules=numbers,
    estimated=st.booleans(),
    peak_memory=st.none() | st.integers(0, 2**50),
)


@given(status=statuses)
@settings(deadline=None)
def test_a_status_survives_the_wire(status: NodeStatus) -> None:
    # As in a step: each rank's slot is summed with zeros.
    sums = status.numbers() + np.zeros(NodeStatus.SIZE)
    assert NodeStatus.of_numbers(sums.tolist()) == status


@settings(max_examples=40, deadline=None)
@given(data=st.data(), world_size=st.integers(1, 6), policy=st.sampled_from(["auto", "equal"]))
def test_somebody_always_works_and_all_ranks_agree(data: st.DataObject, world_size: int, policy: str) -> None:
    left, right = ShareBalancer(policy, world_size, every=3), ShareBalancer(policy, world_size, every=3)
    lengths = np.arange(1, 20)
    for _ in range(data.draw(st.integers(1, 6))):
        nodes = [data.draw(statuses) for _ in range(world_size)]
        left.observe(nodes)
        right.observe(nodes)
        assert left.shares == right.shares
        assert all(share >= 0 for share in left.shares)
        assert sum(left.shares) == pytest.approx(1)
        places = assign(lengths, world_size, left.shares)
        assert sorted(np.concatenate(places).tolist()) == list(range(len(lengths)))
        assert all(not len(mine) for mine, share in zip(places, left.shares, strict=True) if share == 0)


def run(balance: ShareBalancer, speeds: list[float], steps: int, duties: list[float] | None = None) -> int:
    """Steps of nodes that are so fast; returns how often the shares changed."""
    duties = duties or [1.0] * len(speeds)
    changes = 0
    for _ in range(steps):
        nodes = [
            NodeStatus(tokens=int(1e6 * share), busy_seconds=1e6 * share / speed, duty=duty, paused=duty == 0)
            for share, speed, duty in zip(balance.shares, speeds, duties, strict=True)
        ]
        changes += balance.observe(nodes)
    return changes


def test_auto_follows_measured_speed_and_then_stays() -> None:
    balance = ShareBalancer("auto", 2, every=4)
    assert run(balance, [1000.0, 400.0], 20) == 1
    assert balance.shares == pytest.approx([1000 / 1400, 400 / 1400], rel=0.01)
    assert run(balance, [1020.0, 390.0], 20) == 0  # noise is no reason
    assert run(balance, [400.0, 400.0], 60) >= 1
    assert balance.shares == pytest.approx([0.5, 0.5], abs=0.04)


def test_a_hot_node_hands_rows_over_and_gets_them_back() -> None:
    balance = ShareBalancer("equal", 3, every=2)
    run(balance, [1.0, 1.0, 1.0], 4, [1.0, 0.5, 1.0])
    assert balance.shares == pytest.approx([0.4, 0.2, 0.4])
    run(balance, [1.0, 1.0, 1.0], 1, [1.0, 0.0, 1.0])  # a pause doesn't wait for the next plan
    assert balance.shares == [0.5, 0.0, 0.5]
    run(balance, [1.0, 1.0, 1.0], 4)
    assert balance.shares == pytest.approx([1 / 3] * 3)


def test_all_nodes_paused_share_as_if_none_were() -> None:
    balance = ShareBalancer([3.0, 1.0], 2, every=1)
    run(balance, [1.0, 1.0], 3, [0.0, 0.0])
    assert balance.shares == [0.75, 0.25]


def test_a_node_left_without_rows_is_tried_again() -> None:
    balance = ShareBalancer("auto", 2, every=1)
    for _ in range(6):
        balance.observe([NodeStatus(1000, 1.0), NodeStatus(10, 1.0)])
    small = balance.shares[1]
    for _ in range(60):
        balance.observe([NodeStatus(1000, 1.0), NodeStatus(0, 0.0)])
    assert balance.shares[1] > 10 * small


@pytest.mark.parametrize("shares", [[1.0], [0.0, 0.0], [1.0, -1.0], [1.0, float("nan")]])
def test_shares_must_fit(shares: list[float]) -> None:
    with pytest.raises(ValueError, match="one share of 0 or more"):
        ShareBalancer(shares, 2, every=1)
