"""``topology.stages=auto`` on unequal nodes: what they tell each other, and how the blocks are cut by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.families import configuration
from helpers.rings import local_listeners, run_ranks
from macft.collective.ring import Ring
from macft.device.kind import METAL
from macft.model.adapter_settings import AdapterConfig
from macft.model.execution import resolve
from macft.model.settings import ModelConfig
from macft.model.shape import shape_of
from macft.parallel.stage_layout import StageLayout
from macft.planner.cluster_model import Node
from macft.planner.fit import MemoryPlanner
from macft.planner.node_cuts import NodeCuts, agree
from macft.planner.node_report import alike, gather_reports, own_node
from macft.planner.workload import unlike_rows

BLOCKS = 12


def planner_of(_pipelines: int) -> MemoryPlanner:
    """A llama with blocks that are large beside its head, 32 rows in a step, and micro-batches of two."""
    sizes = {"num_hidden_layers": BLOCKS, "hidden_size": 512, "intermediate_size": 2048}
    shape = shape_of(configuration("llama") | sizes, "config.json")
    execution = resolve(ModelConfig(), shape.checkpoint, METAL, packing="false", micro_batch_size=2)
    steps = [unlike_rows(32, 64, 60)]
    return MemoryPlanner(shape, execution, AdapterConfig(), "adamw", steps, validation_rows=0)


def nodes_of(speeds: Sequence[float], memories: Sequence[float] = ()) -> list[Node]:
    sizes = memories or [1e12] * len(speeds)
    return [
        Node(f"rank {rank}", 1e12 * speed, memory, 3e9)
        for rank, (speed, memory) in enumerate(zip(speeds, sizes, strict=True))
    ]


def cuts_of(nodes: Sequence[Node], pipelines: int = 1) -> NodeCuts:
    return NodeCuts({str(number): node for number, node in enumerate(alike(nodes))}, pipelines, planner_of)


def counts(layout: StageLayout | None) -> list[list[int]]:
    assert layout is not None
    return [[len(stage.blocks) for stage in stages] for stages in layout.pipelines]


def cut(speeds: Sequence[float], memories: Sequence[float] = (), pipelines: int = 1) -> list[list[int]]:
    cuts = cuts_of(nodes_of(speeds, memories), pipelines)
    return counts(cuts.layout([str(number) for number in range(len(speeds))]))


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
    assert cut([1, 1, 1], [0.8 * weights, 1e12, 1e12])[0][0] < 4
    nobody = cuts_of(nodes_of([1, 1], [1.0, 1.0]))
    assert nobody.layout(["0", "1"]) is None  # every node's own plan refuses, and names what it lacks


@given(speeds=st.lists(st.floats(0.1, 10), min_size=2, max_size=6), pipelines=st.integers(1, 3))
@settings(deadline=None, max_examples=15)
def test_every_node_has_a_stage_in_the_order_of_ranks(speeds: list[float], pipelines: int) -> None:
    layout = cuts_of(nodes_of(speeds), pipelines).layout([str(number) for number in range(len(speeds))])
    assert layout is not None
    assert [stage.rank for stages in layout.pipelines for stage in stages] == list(range(len(speeds)))
    assert layout.blocks == BLOCKS


def test_the_layout_follows_the_members() -> None:
    """After the loss of a node its neighbours keep their own speeds, under new ranks."""
    cuts = cuts_of(nodes_of([2, 1, 1, 4]))
    assert counts(cuts.layout(["0", "2"])) == [[8, 4]]
    assert counts(cuts.layout(["2", "0"])) == [[4, 8]]
    assert cuts.layout(["3"]) is None
    assert cuts.layout(["0", "one that joined"]) is None
    many = cuts_of(nodes_of([1] * (BLOCKS + 2)))
    assert counts(many.layout([str(number) for number in range(BLOCKS + 2)])) == [[1] * BLOCKS]


def test_all_ranks_take_the_layout_of_rank_0() -> None:
    """Over a ring: what rank 1 would choose by itself doesn't count."""
    told = nodes_of([1, 2])

    def decide(ring: Ring) -> tuple[list[Node], list[list[int]], StageLayout | None]:
        nodes = gather_reports(ring, told[ring.rank])
        seen = nodes if ring.rank == 0 else [replace(node, speed=1e12) for node in nodes]
        chosen, _ = agree(ring, cuts_of(seen))
        return nodes, counts(chosen(2)), chosen(1)

    first, second = run_ranks(local_listeners(2), decide)
    assert first == second == (told, [[4, 8]], None)


def test_where_a_rank_has_nothing_to_tell_nobody_has() -> None:
    def gather(ring: Ring) -> list[Node]:
        return gather_reports(ring, None if ring.rank == 1 else own_node(1e9))

    assert run_ranks(local_listeners(2), gather) == [[], []]
