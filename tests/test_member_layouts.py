"""``topology.stages=auto`` on unequal nodes: what they tell each other, and how the blocks are cut by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.rings import local_listeners, run_ranks
from helpers.unequal_nodes import BLOCKS, counts, nodes_of, planner_of
from macft.collective.ring.ring import Ring
from macft.parallel.stage_layout import StageLayout
from macft.planner.placement.candidates import order_line, rank_names
from macft.planner.placement.cluster_model import Alone, Node
from macft.planner.preflight.member_layouts import MemberLayouts, agree
from macft.planner.preflight.node_report import alike, gather_reports, own_node


def layouts_of(nodes: Sequence[Node], pipelines: int = 1) -> MemberLayouts:
    return MemberLayouts({str(number): node for number, node in enumerate(alike(nodes))}, pipelines, planner_of)


def cut(speeds: Sequence[float], memories: Sequence[float] = (), pipelines: int = 1) -> list[list[int]]:
    layouts = layouts_of(nodes_of(speeds, memories), pipelines)
    return counts(layouts.layout([str(number) for number in range(len(speeds))]))


def test_equal_nodes_get_equally_many_blocks() -> None:
    assert cut([1, 1]) == [[6, 6]]
    assert cut([1, 1, 1]) == [[4, 4, 4]]
    assert cut([2, 1, 1, 2]) != cut([1, 1, 1, 1]) == [[3, 3, 3, 3]]
    assert cut([1, 1, 1, 1], pipelines=2) == [[6, 6], [6, 6]]


def test_a_faster_node_gets_more_blocks() -> None:
    assert cut([2, 1]) == [[8, 4]]
    assert cut([1, 2, 1]) == [[3, 6, 3]]
    assert cut([1, 3, 1, 1, 2], pipelines=2) == [cut([1, 3, 1])[0], [4, 8]]


@given(st.lists(st.floats(0.9, 1.0), min_size=3, max_size=3))
@settings(deadline=None, max_examples=10)
def test_what_a_measurement_varies_by_changes_nothing(speeds: list[float]) -> None:
    assert cut(speeds) == [[4, 4, 4]]
    first, second = (alike(nodes_of([speed, 2.0]))[0].speed for speed in speeds[:2])
    assert first / second == pytest.approx(speeds[0] / speeds[1])  # different chips stay different
    busy = [replace(node, name="one machine") for node in nodes_of([1.0, 0.3, 2.0])[:2]]
    assert [node.speed for node in alike([*busy, *nodes_of([0.5])])] == [1e12, 1e12, 0.5e12]


def test_a_small_node_gets_the_blocks_that_fit() -> None:
    planner = planner_of(1)
    weights = planner.shape.weight_bytes(planner.execution.weight_format)
    assert cut([1, 1], [1e12, 0.8 * weights]) == [[8, 4]]
    nobody = layouts_of(nodes_of([1, 1], [1.0, 1.0]))
    assert nobody.layout(["0", "1"]) is None  # every node's own plan refuses, and names what it lacks


@given(speeds=st.lists(st.floats(0.1, 10), min_size=2, max_size=6), pipelines=st.integers(1, 3))
@settings(deadline=None, max_examples=15)
def test_nodes_keep_their_order_unless_another_one_or_fewer_are_clearly_faster(
    speeds: list[float], pipelines: int
) -> None:
    layouts = layouts_of(nodes_of(speeds), pipelines)
    found = layouts.found([str(number) for number in range(len(speeds))])
    assert found is not None
    if found.in_order is None:  # a pipeline of neighbours may be too slow for a single row
        assert pipelines > 1
        return
    in_order = [stage.rank for stages in found.in_order.layout.pipelines for stage in stages]
    assert in_order == list(range(len(speeds)))
    assert len(found.best.layout.pipelines) == len(found.in_order.layout.pipelines)
    assert found.best.layout.blocks == BLOCKS
    assert found.best is found.in_order or found.best.seconds <= 0.95 * found.in_order.seconds
    order = [stage.rank for stages in found.best.layout.pipelines for stage in stages]
    assert bool(order_line(found, rank_names(len(speeds)))) == (order != in_order)


def test_stages_may_have_another_order_than_ranks_and_nodes_may_have_none() -> None:
    planner = planner_of(1)
    weights = planner.shape.weight_bytes(planner.execution.weight_format)

    def found(speeds: list[float], memories: list[float]) -> tuple[str, str]:
        nodes = nodes_of(speeds, [weights * memory for memory in memories])
        pipelines = layouts_of(nodes).found(["0", "1", "2"])
        assert pipelines is not None
        return pipelines.best.layout.described(3), order_line(pipelines, rank_names(3))

    # The last stage holds the fewest micro-batches.
    layout, line = found([1, 1, 1], [0.75, 99, 99])
    assert layout == "rank 1: blocks 0-4 > rank 2: blocks 5-8 > rank 0: blocks 9-11"
    assert line.startswith("stages in another order than the nodes; ")
    assert line.endswith(" s with all nodes in their order")
    layout, line = found([1, 1, 0.05], [0.8, 0.8, 0.8])
    assert layout == "rank 0: blocks 0-5 > rank 1: blocks 6-11; rank 2 without a stage"
    assert line.startswith("no stage for rank 2: a spare, which takes blocks when another node is lost; ")
    _, line = found([1, 1, 1], [0.45, 1.2, 1.2])
    assert line.endswith("node is lost; all nodes in their order have no layout that fits")


def test_the_layout_follows_the_members() -> None:
    """After the loss of a node its neighbours keep their own speeds, under new ranks."""
    layouts = layouts_of(nodes_of([2, 1, 1, 4]))
    assert counts(layouts.layout(["0", "2"])) == [[8, 4]]
    assert counts(layouts.layout(["2", "0"])) == [[4, 8]]
    assert layouts.layout(["3"]) is None
    assert layouts.layout(["0", "one that joined"]) is None
    many = layouts_of(nodes_of([1] * (BLOCKS + 2)))
    assert counts(many.layout([str(number) for number in range(BLOCKS + 2)])) == [[1] * BLOCKS]


def test_a_node_that_joined_gets_rows_as_the_others() -> None:
    """With equal shares, which those who began the run have."""
    four = nodes_of([1] * 4)
    told = dict(zip(["0", "1", "2", "joined"], four, strict=True))
    layouts = MemberLayouts(told, 2, planner_of, dict.fromkeys("0123", 1.0))
    assert counts(layouts.layout(list(told))) == [[6, 6], [6, 6]]


def test_measured_speeds_count_where_all_nodes_have_them() -> None:
    first, second = (replace(node, alone=(Alone(6e-12, 0.0),)) for node in nodes_of([1, 1]))
    trained = replace(first, trained=0.5e12)
    assert alike([trained, second]) == [trained, second]
    both = alike([trained, replace(second, trained=1.5e12)])
    assert [node.speed for node in both] == [0.5e12, 1.5e12]
    assert [node.alone[0].per_token for node in both] == pytest.approx([12e-12, 4e-12])


def test_all_ranks_take_the_layout_of_rank_0() -> None:
    """Over a ring: what rank 1 would choose by itself doesn't count."""
    told = nodes_of([1, 2])

    def decide(ring: Ring) -> tuple[list[Node], list[list[int]], StageLayout | None]:
        nodes = gather_reports(ring, told[ring.rank])
        seen = nodes if ring.rank == 0 else [replace(node, speed=1e12) for node in nodes]
        chosen, _ = agree(ring, layouts_of(seen))
        return nodes, counts(chosen(2)), chosen(1)

    first, second = run_ranks(local_listeners(2), decide)
    assert first == second == (told, [[4, 8]], None)


def test_where_a_rank_has_nothing_to_tell_nobody_has() -> None:
    def gather(ring: Ring) -> list[Node]:
        return gather_reports(ring, None if ring.rank == 1 else own_node(planner_of(1), 1e9))

    assert run_ranks(local_listeners(2), gather) == [[], []]
