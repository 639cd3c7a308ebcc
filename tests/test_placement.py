"""Cuts of a model over unequal nodes: against brute force, in memory, and against a simulated step."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.rings import local_listeners, run_ranks
from macft.collective.ring.ring import Ring
from macft.model.adapters.settings import AdapterConfig
from macft.model.execution import Execution
from macft.model.shape import read_shape
from macft.parallel.stage_layout import StageLayout, even_layout
from macft.planner.memory_planner import MemoryPlanner
from macft.planner.placement.candidates import run_placements
from macft.planner.placement.cluster_model import (
    Alone,
    ModelCost,
    Node,
    NodeLink,
    RingLinks,
    StageCost,
    StepWork,
    clock_of,
)
from macft.planner.placement.compare import LayoutDecision, compare, preferred, set_pipelines, why_no_pipeline
from macft.planner.placement.pipeline_search import PipelineSearch
from macft.planner.placement.pipeline_simulator import simulate
from macft.planner.placement.stage_costs import StageTables
from macft.planner.preflight.node_report import from_payload, gather_reports, own_report, ring_of, to_payload
from macft.planner.whole_model import WholeModelPlanner
from macft.planner.workload import unlike_rows
from placement import LLAMA_70B, UNEQUAL, cuts, inputs
from stage_times import measured_parts

GIGABIT = NodeLink(117e6, 150e-6)
NO_WIRE = NodeLink(1e30, 0.0)


def model(blocks: int = 6, first_trained: int = 0, **changes: float) -> ModelCost:
    """Blocks of 100 bytes and 1 operation a token; a trained one costs twice or, recomputed, three times as much."""
    values = {"embedding_bytes": 30.0, "head_bytes": 30.0, "hidden": 1.0, "saved": 8.0, "inside": 4.0} | changes
    trained = [number >= first_trained for number in range(blocks)]
    return ModelCost(
        forward=(1.0,) * blocks,
        backward=tuple(map(float, trained)),
        block_bytes=(100.0,) * blocks,
        file_bytes=(100.0,) * blocks,
        inside_again=values["inside"],
        loss_operations=values.pop("loss_operations", 0.5),
        loss_bytes=2.0,
        loss_most=1e9,
        state=20.0,
        update=0.0,
        exchanged=values.pop("exchanged", 0.0),
        first_trained=first_trained,
        **values,
    )


def nodes(speeds: list[float], memory: list[float] | None = None, disk: float = 1e-9) -> list[Node]:
    memory = memory or [1e6] * len(speeds)
    return [Node(f"n{i}", speed, size, disk) for i, (speed, size) in enumerate(zip(speeds, memory, strict=True))]


def only_pipelines(members: list[Node], costs: ModelCost, work: StepWork, **how: object) -> LayoutDecision:
    ring = RingLinks.of_one_kind(NO_WIRE, len(members))
    return compare(members, ring, costs, work, kinds=["pipeline"], **how)["pipeline"]  # type: ignore[arg-type]


@pytest.mark.parametrize(("count", "micro_batches"), [(1, 3), (2, 1), (4, 4), (4, 16), (8, 5)])
def test_equal_stages_take_the_time_of_the_bubble_formula(count: int, micro_batches: int) -> None:
    equal = [StageCost(1.0, 2.0)] * count
    step = simulate(equal, micro_batches)
    assert step.seconds == pytest.approx(3.0 * (micro_batches + count - 1))
    assert clock_of(equal).seconds(micro_batches) == pytest.approx(step.seconds)
    assert [step.in_flight(stage) for stage in range(count)] == [
        min(micro_batches, 2 * (count - stage) - 1) for stage in range(count)
    ]


@settings(deadline=None, max_examples=300)
@given(
    speeds=st.lists(st.floats(0.3, 1.0), min_size=1, max_size=6),
    micro_batches=st.integers(1, 32),
    ratio=st.floats(1.0, 3.0),
    wire=st.sampled_from([0.0, 0.01, 0.1]),
    frozen=st.integers(0, 3),
)
def test_the_formula_is_near_the_simulated_step(
    speeds: list[float], micro_batches: int, ratio: float, wire: float, frozen: int
) -> None:
    frozen = min(frozen, len(speeds) - 1)
    costs = [
        StageCost(
            speed,
            0.0 if place < frozen else ratio * speed,
            0.0 if place == len(speeds) - 1 else wire,
            bound=place >= frozen,
        )
        for place, speed in enumerate(speeds)
    ]
    step = simulate(costs, micro_batches)
    for place, cost in enumerate(costs):
        own = sorted((each for each in step.intervals if each.stage == place), key=lambda each: each.start)
        assert all(a.end <= b.start + 1e-9 for a, b in itertools.pairwise(own))
        assert step.busy(place) == pytest.approx(micro_batches * cost.busy)
    assert step.seconds >= max(micro_batches * cost.busy for cost in costs) - 1e-9
    # All but an upper bound, and never far off.
    assert 0.9 * step.seconds <= clock_of(costs).seconds(micro_batches) <= 1.3 * step.seconds


def by_brute_force(
    members: list[Node], costs: ModelCost, work: StepWork, micro_batches: int, orders: list[tuple[int, ...]]
) -> float:
    """The least time by the formula of a pipeline of two or more of ``members`` in one of ``orders``."""
    tokens, best = work.tokens / micro_batches, math.inf
    tables = [
        StageTables(costs, node, tokens, max(tokens, work.longest), recompute=work.recompute, streams=True)
        for node in members
    ]
    for order in orders:
        for cut in itertools.combinations(range(1, costs.blocks), len(order) - 1):
            borders = [0, *cut, costs.blocks]
            made = []
            for place, rank in enumerate(order):
                window, at = min(micro_batches, len(order) - place), (borders[place], borders[place + 1])
                if not math.isfinite(tables[rank].seconds(window)[at]):
                    break
                made.append(tables[rank].choice(*at, window, 0.0).cost)
            else:
                best = min(best, clock_of(made).seconds(micro_batches))
    return best


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_the_search_finds_what_brute_force_finds(data: st.DataObject) -> None:
    count, blocks = data.draw(st.integers(2, 3)), data.draw(st.integers(3, 6))
    order = data.draw(st.sampled_from(["ring", "free"]))
    speeds = data.draw(st.lists(st.sampled_from([1.0, 2.0, 2.5, 7.0]), min_size=count, max_size=count))
    memory = data.draw(st.lists(st.floats(250.0, 900.0), min_size=count, max_size=count))
    costs = model(blocks, data.draw(st.integers(0, blocks - 1)))
    work = StepWork(24.0, 8, 3.0, 8, data.draw(st.sampled_from(["auto", "always"])))
    members = nodes(speeds, memory, disk=data.draw(st.sampled_from([1e-9, 50.0])))
    orders = [each for size in range(2, count + 1) for each in itertools.permutations(range(count), size)]
    if order == "ring":
        turns = [[(turn + step) % count for step in range(count)] for turn in range(count)]
        orders = [each for each in orders if any(sorted(each, key=turn.index) == list(each) for turn in turns)]
    expected = by_brute_force(members, costs, work, 8, orders)
    found = PipelineSearch(members, RingLinks.of_one_kind(NO_WIRE, count), costs, work, 8, order).pipelines
    best = min((each.clock.seconds(8) for made in found.values() for each in made), default=math.inf)
    assert best == pytest.approx(expected, rel=1e-9)


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_no_layout_exceeds_a_nodes_memory(data: st.DataObject) -> None:
    count, blocks = data.draw(st.integers(2, 4)), data.draw(st.integers(2, 9))
    memory = data.draw(st.lists(st.floats(100.0, 1200.0), min_size=count, max_size=count))
    costs = model(blocks, data.draw(st.integers(0, blocks - 1)))
    work = StepWork(32.0, 8, 4.0, None, data.draw(st.sampled_from(["auto", "always"])))
    members = nodes([1.0 + i for i in range(count)], memory, disk=100.0)
    found = compare(members, RingLinks.of_one_kind(GIGABIT, count), costs, work)
    for decision in found.values():
        for stages, choices, micro_batches in zip(
            decision.layout.pipelines, decision.choices, decision.micro_batches, strict=True
        ):
            tokens = max(32.0 / sum(decision.micro_batches), 4.0)
            for place, (stage, choice) in enumerate(zip(stages, choices, strict=True)):
                # Counted again, from below: what is resident, of each micro-batch in flight what its backward needs.
                held = 100.0 * choice.resident + 20.0
                held += 30.0 * (stage.first == 0) + 30.0 * (stage.end == blocks)
                trained = sum(number >= costs.first_trained for number in stage.blocks)
                kept = 1.0 if choice.recompute else 8.0
                held += min(micro_batches, len(stages) - place) * trained * kept * tokens
                assert choice.memory is not None
                assert held <= choice.memory.peak <= memory[stage.rank] * (1 + 1e-9)


def test_unequal_macs_are_1_3_times_as_fast_as_with_blocks_in_proportion_to_memory() -> None:
    members, costs, work = inputs(LLAMA_70B, UNEQUAL, rows=16, length=512)
    even, by_memory, pipeline, planned, ideal = cuts(members, RingLinks.of_one_kind(GIGABIT, 4), costs, work)
    assert by_memory.seconds >= 1.3 * planned.seconds
    assert even.seconds >= 1.3 * pipeline.seconds
    assert ideal.seconds <= planned.seconds <= 1.15 * ideal.seconds


def test_a_slow_node_is_left_out_where_that_is_faster() -> None:
    work = StepWork(16.0, 4, 4.0)
    decision = only_pipelines(nodes([1.0, 0.01, 1.0]), model(), work)
    assert decision.ranks == [0, 2]
    assert decision.choice_of(1) is None
    slow_but_needed = only_pipelines(nodes([1.0, 0.1, 1.0], [450.0] * 3), model(8), work)
    assert slow_but_needed.ranks == [0, 1, 2]


def test_many_rows_make_several_pipelines_and_rows_go_to_the_faster_one() -> None:
    work = StepWork(64.0, 16, 4.0, recompute="always")
    decision = only_pipelines(nodes([1.0] * 4, [550.0] * 4), model(6), work)
    assert [len(stages) for stages in decision.layout.pipelines] == [2, 2]
    assert decision.micro_batches == (8, 8)
    uneven = only_pipelines(nodes([2.0, 2.0, 1.0, 1.0], [550.0] * 4), model(6, saved=1.0), work)
    by_pipeline = zip(uneven.layout.pipelines, uneven.micro_batches, strict=True)
    shares = {frozenset(stage.rank for stage in stages): count for stages, count in by_pipeline}
    if frozenset({0, 1}) in shares:
        assert shares[frozenset({0, 1})] > shares[frozenset({2, 3})]


def chosen(members: list[Node], ring: RingLinks, work: StepWork) -> LayoutDecision:
    found = compare(members, ring, model(), work)
    return found[preferred(found)]


def test_every_node_keeps_the_whole_model_where_it_can() -> None:
    """Without a bubble, and recomputing nothing, that is faster than a pipeline."""
    members = [replace(node, alone=(Alone(12.5, 0.0),)) for node in nodes([1.0, 1.0])]
    ring, work = RingLinks.of_one_kind(NO_WIRE, 2), StepWork(32.0, 8, 4.0, recompute="always")
    decision = chosen(members, ring, work)
    assert decision.placement == "replicate"
    assert decision.micro_batches == (4, 4)
    assert decision.seconds == pytest.approx(16 * 12.5)
    assert decision.disk == 0
    # Streaming with a disk that is too slow loses to a pipeline that holds all in memory.
    slow = [replace(node, alone=(Alone(18.5, 5000.0, streams=True),)) for node in members]
    found = compare(slow, ring, model(), work)
    assert set(found) == {"stream", "pipeline"}
    assert found["stream"].seconds == pytest.approx(5000.0)
    assert chosen(slow, ring, work).placement == "pipeline"
    mixed = [members[0], replace(slow[1], speed=1e-6)]
    assert compare(mixed, ring, model(), work, kinds=["stream"])["stream"].micro_batches == (8, 0)
    assert compare(mixed, ring, model(), work, kinds=["stream"])["stream"].disk == 0
    quick = [replace(node, alone=(Alone(18.5, 10.0, streams=True),)) for node in members]
    assert chosen(quick, ring, work).placement == "stream"


def test_a_stage_that_does_not_fit_reads_blocks_from_disk() -> None:
    work = StepWork(16.0, 4, 4.0, recompute="always")
    decision = only_pipelines(nodes([1.0, 1.0], [450.0, 450.0], disk=1e3), model(12), work)
    assert any(choice.resident < len(stage.blocks) for stages, choices in
               zip(decision.layout.pipelines, decision.choices, strict=True)
               for stage, choice in zip(stages, choices, strict=True))  # fmt: skip
    assert decision.disk > 0


def test_stages_follow_the_ring_unless_every_order_is_allowed() -> None:
    """A small node is best the last one, where one micro-batch is in flight; in the ring it may be between others."""
    costs, work = model(9, saved=60.0, inside=1.0), StepWork(32.0, 8, 4.0)
    members = nodes([1.0, 1.0, 1.0, 1.0], [5000.0, 700.0, 2500.0, 2500.0])
    ring = only_pipelines(members, costs, work)
    for stages in ring.layout.pipelines:
        ranks = [stage.rank for stage in stages]
        assert sum(a > b for a, b in itertools.pairwise(ranks)) <= 1
    assert only_pipelines(members, costs, work, order="free").seconds <= ring.seconds * (1 + 1e-9)


def test_more_than_eight_nodes_are_cut_as_groups_of_neighbours() -> None:
    decision = only_pipelines(nodes([1.0] * 12, [400.0] * 12), model(12), StepWork(96.0, 24, 4.0, recompute="always"))
    ranks = [[stage.rank for stage in stages] for stages in decision.layout.pipelines]
    assert all(each == list(range(each[0], each[0] + len(each))) for each in ranks)
    assert len({len(each) for each in ranks}) == 1


@pytest.mark.parametrize(
    ("blocks", "message"),
    [(1, "topology.placement: a model of one block can't be cut"), (6, "topology.memory_budget: no pipeline fits")],
)
def test_why_there_is_no_pipeline_is_one_line(blocks: int, message: str) -> None:
    members = nodes([1.0, 1.0], [50.0, 50.0])
    assert not compare(members, RingLinks.of_one_kind(GIGABIT, 2), model(blocks), StepWork(8.0, 2, 4.0))
    line = why_no_pipeline(members, model(blocks))
    assert line.startswith(message)
    assert "\n" not in line


def test_stages_that_the_user_has_set_take_what_the_search_says_of_its_own() -> None:
    members, ring, work = nodes([2.0, 1.0]), RingLinks.of_one_kind(GIGABIT, 2), StepWork(32.0, 8, 4.0, 8)
    found = compare(members, ring, model(), work, kinds=["pipeline"], order="given")["pipeline"]
    assert set_pipelines(members, ring, model(), work, found.layout) == found
    even = set_pipelines(members, ring, model(), work, even_layout(6, range(2)))
    assert even is not None
    assert even.seconds > found.seconds
    assert set_pipelines(nodes([2.0, 1.0], [50.0, 50.0]), ring, model(), work, found.layout) is None


def test_slow_links_lengthen_a_step_by_what_waits_for_them() -> None:
    costs, work, members = model(hidden=100.0), StepWork(32.0, 8, 4.0, 8), nodes([1.0, 1.0])
    fast, slow = (
        compare(members, RingLinks.of_one_kind(link, 2), costs, work, kinds=["pipeline"])["pipeline"]
        for link in (NodeLink(1e9, 0.0), NodeLink(20.0, 0.0))
    )
    assert fast.wire < slow.wire
    assert fast.seconds < slow.seconds
    mixed = RingLinks((NodeLink(1e9, 0.0), NodeLink(5.0, 0.1), NodeLink(1e9, 0.0)))
    assert mixed.between(0, 1) == NodeLink(1e9, 0.0)
    assert mixed.between(2, 1) == NodeLink(5.0, 0.1)
    assert mixed.all_reduce(100.0, 1) == 0.0
    assert np.isclose(mixed.all_reduce(15.0, 3), 4 * (0.1 + 15.0 / 3 / 5.0))


def test_nodes_report_themselves_and_every_rank_gets_the_same_layout() -> None:
    """Over a ring: from each node's report to the layout that rank 0 sends."""
    own = [Node("a", 2.0, 700.0, 9.0, (Alone(3.0, 0.5, True),)), Node("b", 1.0, 600.0, 9.0, trained=0.7)]
    costs, work = model(), StepWork(16.0, 4, 4.0, recompute="always")

    def agree(ring: Ring) -> tuple[list[Node], StageLayout]:
        found = gather_reports(ring, own[ring.rank])
        links = RingLinks.of_one_kind(GIGABIT, len(found))
        kinds = compare(found, links, costs, work, kinds=["pipeline"]) if ring.rank == 0 else {}
        sent = json.dumps(kinds["pipeline"].layout.to_data()).encode() if kinds else b""
        return found, StageLayout.from_data(json.loads(ring.broadcast(sent)))

    first, second = run_ranks(local_listeners(2), agree)
    assert first == second
    assert first[0] == own
    assert first[1].place_of(1) is not None


@settings(deadline=None)
@given(payload=st.binary(max_size=40) | st.recursive(st.none() | st.floats() | st.text(max_size=3), st.lists).map(
    lambda value: json.dumps(value).encode()))  # fmt: skip
def test_any_report_is_survived(payload: bytes) -> None:
    node = from_payload(payload)
    assert node is None or node.memory > 0


def test_a_runs_layout_follows_from_reports_and_the_memory_planner(bundled_model: Path) -> None:
    shape = read_shape(bundled_model)
    execution = Execution(device="cpu", kernels="mlx", dtype="float32", max_logits=2**21)
    planner = MemoryPlanner(shape, execution, AdapterConfig(), "adamw", [unlike_rows(8, 257, 64)], validation_rows=0)
    whole_model = WholeModelPlanner(planner, 0.4e9, "replicate", "auto", auto=False)
    node = own_report(whole_model, name="this", processes=2, address="127.0.0.1")
    assert node.alone == ()  # the weights alone are 0.54 GB
    assert node.speed > 0
    assert from_payload(to_payload(node)) == node
    assert ring_of([node, node]).between(0, 1) == node.link
    assert ring_of([node, replace(node, link=None)]).between(0, 1) == GIGABIT
    faster = replace(node, speed=2 * node.speed)
    found, _ = run_placements([node, faster], ring_of([node, faster]), lambda _: planner, None, counts=[1])
    decision = found[preferred(found)]
    assert decision.placement == "pipeline"
    sizes = {stage.rank: len(stage.blocks) for stage in decision.layout.pipelines[0]}
    assert sizes[1] > sizes[0]
    for rank in (0, 1):
        choice = decision.choice_of(rank)
        assert choice is not None
        assert choice.recompute
        assert choice.memory is not None
        assert choice.memory.peak <= 0.4e9
    whole = own_report(replace(whole_model, budget=64e9), name="this")
    (way,) = whole.alone
    assert not way.streams
    assert from_payload(to_payload(whole)) == whole


def test_the_parts_that_calibrate_the_simulator_are_measured(tiny_model_folder: Path) -> None:
    """As benchmarks/placement.py --measure does."""
    parts = measured_parts(tiny_model_folder, "mlx", 16)
    assert min(parts.embedding, parts.forward, parts.backward, parts.head) > 0
