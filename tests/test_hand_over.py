"""Stages of a pipeline hand over blocks: when another layout is looked for, which one is found, and what fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from helpers.rings import local_listeners, run_ranks
from helpers.unequal_nodes import BLOCKS, counts, nodes_of, planner_of
from macft.collective.ring.ring import Ring
from macft.collective.solo import Solo
from macft.errors import ConfigError
from macft.parallel.node_status import NodeStatus
from macft.parallel.shares import DataShard
from macft.parallel.stage_balance import StageBalancer, StageSpeeds
from macft.parallel.stage_layout import Stage, StageLayout, even_layout
from macft.parallel.stage_places import Improvement, StagePlaces
from macft.planner.memory_planner import MemoryPlanner
from macft.planner.placement.cluster_model import Node
from macft.planner.preflight.hand_over import LEAST_GAIN, HandOver
from macft.planner.preflight.member_layouts import MemberLayouts
from macft.planner.preflight.node_report import to_payload
from macft.planner.preflight.refit import StageRefit, WholeModelRefit
from macft.planner.streamed_memory import streamed_parts


def layout_of(*sizes: int) -> StageLayout:
    ends = [sum(sizes[:place]) for place in range(len(sizes) + 1)]
    return StageLayout((tuple(Stage(rank, *ends[rank : rank + 2]) for rank in range(len(sizes))),))


def status(seconds: float, *, wait: float = 0.0, duty: float = 1.0) -> NodeStatus:
    return NodeStatus(tokens=100, busy_seconds=seconds + wait, wait_seconds=wait, duty=duty)


def looks(balancer: StageBalancer, statuses: Sequence[NodeStatus], layout: StageLayout, steps: int) -> list[int]:
    """The steps, from 1, after which it looks for another layout."""
    return [step for step in range(1, steps + 1) if balancer.observe(statuses, layout)]


def test_it_looks_for_another_layout_only_after_several_uneven_steps_and_then_not_for_long() -> None:
    layout = layout_of(6, 6)
    even, uneven = [status(1.0), status(1.05)], [status(1.0), status(1.5)]
    assert looks(StageBalancer(2, every=4), even, layout, 200) == []
    balancer = StageBalancer(2, every=4)
    assert looks(balancer, uneven, layout, 60) == [10, 42]
    assert looks(balancer, even, layout, 4) + looks(balancer, uneven, layout, 8) == []
    # What a stage waits for others is no part of its own time, and a hot one is as slow as it has to rest.
    assert looks(StageBalancer(2, every=4), [status(1.0, wait=1.0), status(1.05)], layout, 60) == []
    assert looks(StageBalancer(2, every=1), [status(1.0), status(1.0, duty=0.5)], layout, 4) == [4]
    # A node without blocks that could have some.
    assert looks(StageBalancer(3, every=1), [*even, NodeStatus()], layout, 4) == [4]


def test_a_node_that_joins_decides_as_the_others() -> None:
    old = StageBalancer(2, every=2)
    looks(old, [status(1.0), status(2.0)], layout_of(6, 6), 6)
    state = old.state_dict()
    one, other = StageBalancer.from_state_dict(state, 3), StageBalancer.from_state_dict(state, 3)
    statuses = [status(1.0), status(2.0), status(1.0)]
    assert looks(one, statuses, layout_of(4, 4, 4), 40) == looks(other, statuses, layout_of(4, 4, 4), 40) == [16, 32]


def hand_over(nodes: Sequence[Node], pipelines: int = 1) -> HandOver:
    """On rank 0 of a world of which only the number of members counts."""
    world = Solo()
    world.__class__ = type("World", (Solo,), {"world_size": len(nodes)})
    told = {str(rank): node for rank, node in enumerate(nodes)}
    return HandOver(world, MemberLayouts(told, pipelines, planner_of), nodes[0], lambda _: None)


def measured(layout: StageLayout, paces: Sequence[float], duties: Sequence[float] = ()) -> StageSpeeds:
    """Times of stages whose nodes are so fast."""
    seconds = tuple(len(layout.blocks_of(rank)) / pace or None for rank, pace in enumerate(paces))
    return StageSpeeds(seconds, tuple(duties) or (1.0,) * len(paces), ("",) * len(paces))


def test_a_slow_or_hot_stage_hands_over_blocks() -> None:
    rules, layout = hand_over(nodes_of([1, 1])), layout_of(6, 6)
    assert rules.improve(layout, measured(layout, [1, 0.95])) is None
    for speeds in (measured(layout, [1, 0.5]), measured(layout, [1, 1], [1.0, 0.5])):
        found = rules.improve(layout, speeds)
        assert found is not None
        assert counts(found.layout) == [[8, 4]]
        assert LEAST_GAIN < found.gain < 0.5
        assert rules.improve(found.layout, measured(found.layout, [1, 0.5])) is None
    back = rules.improve(layout_of(8, 4), measured(layout_of(8, 4), [1, 1]))
    assert back is not None
    assert counts(back.layout) == [[6, 6]]
    assert Improvement.unpack(back.pack()) == back


def test_a_node_that_would_slow_down_the_others_gets_no_blocks_and_some_when_it_may_work_again() -> None:
    rules, layout = hand_over(nodes_of([1, 1, 1])), layout_of(4, 4, 4)
    hot = rules.improve(layout, measured(layout, [1, 1, 1], [1.0, 0.02, 1.0]))
    assert hot is not None
    assert [[stage.rank for stage in stages] for stages in hot.layout.pipelines] == [[0, 2]]
    rules.remember(hot.paces)
    cool = rules.improve(hot.layout, measured(hot.layout, [1, 1, 1]))
    assert cool is not None
    assert counts(cool.layout) == [[4, 4, 4]]
    alone = hand_over(nodes_of([1, 1])).improve(layout_of(6, 6), measured(layout_of(6, 6), [1, 1], [1.0, 0.02]))
    assert alone is not None
    assert counts(alone.layout) == [[12]]


def test_what_was_measured_counts_for_the_members_that_are_left() -> None:
    """And a node that joins has told what it is."""
    rules, layout = hand_over(nodes_of([1, 1])), layout_of(6, 6)
    assert rules.layout_of(2) is None  # as at the start
    rules.remember([1.0, 0.5])
    assert counts(rules.layout_of(2)) == [[8, 4]]
    rules.learn([to_payload(node) for node in nodes_of([1, 2])])
    assert counts(rules.layout_of(2)) == [[6, 6]]
    rules.learn([b"", b""])
    assert counts(rules.layout_of(2)) == [[6, 6]]
    assert rules.improve(layout, measured(layout, [1, 1])) is None


def test_all_ranks_take_the_layout_of_rank_0() -> None:
    def improve(ring: Ring) -> tuple[str, int]:
        rules = HandOver(
            ring,
            MemberLayouts(dict(zip("01", nodes_of([1, 1]), strict=True)), 1, planner_of),
            Node("n", 1, 1, 1),
            lambda _: None,
        )
        places = StagePlaces(ring, lambda _: layout_of(6, 6), rules)
        slow = 1 if ring.rank == 0 else 0  # rank 1 would decide otherwise
        found = places.improvement(measured(layout_of(6, 6), [0.5 if rank == slow else 1.0 for rank in (0, 1)]))
        assert found is not None
        channels = places.channels()
        places.hand_over(found.layout)
        assert places.channels() is channels  # the same neighbours
        places.hand_over(even_layout(BLOCKS, [0]))
        assert places.channels() is not channels
        return str(found.layout), len(places.channels().peers)

    expected = "rank 0: blocks 0-7 > rank 1: blocks 8-11"
    assert run_ranks(local_listeners(2), improve) == [(expected, 0), (expected, 0)]


def planner(shard: DataShard, execution: object, steps: object) -> MemoryPlanner:  # noqa: ARG001
    return planner_of(shard.world_size)


def test_a_node_with_more_rows_takes_smaller_micro_batches_or_says_what_it_lacks() -> None:
    whole = planner_of(1)
    execution = whole.execution.with_batch(None, "none")
    four, one = (whole.parts(whole.execution.with_batch(size, "none")).peak for size in (4, 1))

    def refit(budget: float) -> WholeModelRefit:
        return WholeModelRefit(planner, execution, [], budget, "auto")

    layout = even_layout(1, [0])
    assert refit(1e12)(layout, 0, 1).execution == execution
    assert refit(four)(layout, 0, 1).execution.micro_batch_size == 4
    with pytest.raises(ConfigError, match=rf"one row at a time the run would need about {one / 1e9:.2f} GB, and "):
        refit(0.9 * one)(layout, 0, 1)
    with pytest.raises(ConfigError, match=r"with the micro-batches that training.deterministic fixes the run would"):
        replace(refit(four), fixed=True)(layout, 0, 1)
    streamed = replace(refit(1e12), execution=execution.streamed(tuple(range(BLOCKS))))
    half = streamed_parts(whole, whole.execution.streamed(tuple(range(6)))).peak
    assert 6 <= len(replace(streamed, budget=half)(layout, 0, 1).execution.resident_blocks) < BLOCKS


def test_a_node_with_more_blocks_reads_some_from_disk_or_says_what_it_lacks() -> None:
    base = planner_of(1).execution.pipelined(0)

    def refit(budget: float) -> StageRefit:
        return StageRefit(planner, base, [], budget, "auto", 0, may_keep=True)

    half = refit(1e12).planned(planner_of(1), layout_of(6, 6), 0).parts(6).peak
    assert refit(half)(layout_of(6, 6), 0, 2).execution.block_capacity >= 6
    assert 0 < refit(half)(layout_of(10, 2), 0, 2).execution.block_capacity < 10
    assert refit(half)(layout_of(6, 6), 2, 3).execution.resident_blocks == ()  # no stage
    alone, peak, budget = refit(1.5 * half)(even_layout(BLOCKS, [0]), 0, 1)
    assert peak <= budget == 1.5 * half
    assert (alone.placement, alone.micro_batch_size) == ("pipeline", 2)
    assert 0 < alone.block_capacity < BLOCKS
    least = streamed_parts(planner_of(1), base.with_batch(1, "none").streamed(())).peak
    assert refit(least)(even_layout(BLOCKS, [0]), 0, 1).execution.micro_batch_size == 1
    with pytest.raises(ConfigError, match="with its blocks read from disk the run would need about"):
        replace(refit(least), fixed=True)(even_layout(BLOCKS, [0]), 0, 1)
    with pytest.raises(ConfigError, match=r"read from disk the run would need about .* GB, and .* GB are available"):
        refit(0.1 * half)(even_layout(BLOCKS, [0]), 0, 1)
