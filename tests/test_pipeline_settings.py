"""The settings of pipelines: what can't be is one line, and which layouts they make."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.families import configuration
from macft.config.execution import execution_for
from macft.config.schema import TrainConfig
from macft.config.validate import problems
from macft.device.kind import METAL, Device
from macft.errors import ConfigError
from macft.model.adapters.settings import AdapterConfig
from macft.model.execution import WeightFormat, resolve
from macft.model.settings import ModelConfig
from macft.model.shape import shape_of
from macft.parallel.stage_layout import balanced_layout, even_layout
from macft.planner.memory_planner import MemoryPlanner
from macft.planner.placement.configured_layout import check_layout, decide_layout
from macft.planner.stage import StagePlanner
from macft.planner.workload import unlike_rows
from macft.topology.settings import TopologyConfig


def config_of(**topology: object) -> TrainConfig:
    config = TrainConfig()
    config.dataset.path, config.training.epochs, config.training.steps = "rows", None, 9
    config.topology = TopologyConfig(**{"kind": "local", "nodes": 2, "placement": "pipeline", **topology})  # type: ignore[arg-type]
    return config


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ({"kind": "single", "nodes": 1}, "topology.placement: pipeline needs two or more nodes, and there is one"),
        (
            {"nodes": 4, "pipelines": 3},
            "topology.pipelines: 3 pipelines of 4 nodes; each needs two or more, so use 1 to 2",
        ),
        ({"pipelines": 0}, "topology.pipelines: 0 must be 1 or more"),
        ({"stages": [6]}, "topology.stages: [6] has 1 numbers, and there are 2 nodes"),
        (
            {"nodes": 5, "pipelines": 2, "stages": [2, 5, 3, 2, 2]},
            "topology.stages: 5 nodes can't form 2 equal pipelines; use auto",
        ),
        ({"stages": [6, "x"]}, "topology.stages: [6, 'x'] is neither auto nor a list of numbers of blocks"),
        ({"stages": [6, 0]}, "topology.stages: [6, 0] is neither auto nor a list of numbers of blocks"),
        ({"stages": "even"}, "topology.stages: even is neither auto nor a list of numbers of blocks"),
        ({"placement": "stream", "pipelines": 2}, "topology.pipelines: only topology.placement=pipeline has them"),
        ({"placement": "auto", "stages": [1, 1]}, "topology.stages: only topology.placement=pipeline has them"),
    ],
)
def test_a_topology_that_cannot_be(topology: dict[str, object], message: str) -> None:
    (line,) = problems(config_of(**topology))
    assert line.startswith(message)


def test_what_does_not_go_with_a_pipeline() -> None:
    config = config_of()
    assert problems(config) == []
    config.training.sync = "diloco"
    assert any(line.startswith("topology.placement: a pipeline's nodes exchange hidden") for line in problems(config))
    config = config_of()
    config.collective.backend = "mlx"
    assert "topology.placement: pipeline works on collective=ring only" in problems(config)
    config = config_of()
    config.collective.streams = False
    assert any("pipeline needs collective.streams=true" in line for line in problems(config))
    config = config_of()
    config.adapter.type = "full"
    assert any("pipeline can't train the model's own weights" in line for line in problems(config))
    config = config_of(nodes=8, pipelines=4)
    config.training.batch_size = 3
    (line,) = problems(config)
    assert line.startswith("training.batch_size: 3 rows can't be shared by 4 pipelines")
    config.training.batch_size = 4  # fewer than nodes
    assert problems(config) == []


def test_there_are_sixteen_micro_batches_unless_told_otherwise() -> None:
    def rows(**topology: object) -> int | None:
        config = config_of(**topology)
        config.training.batch_size = 64
        return execution_for(config, None, WeightFormat("float32"), Device("cpu")).micro_batch_size

    assert rows() == 4
    assert rows(nodes=4, pipelines=2) == 2
    assert rows(placement="stream") is None


@pytest.mark.parametrize(
    ("topology", "world_size", "shown"),
    [
        ({}, 2, "rank 0: blocks 0-3 > rank 1: blocks 4-6"),
        ({"stages": [2, 5]}, 2, "rank 0: blocks 0-1 > rank 1: blocks 2-6"),
        ({"stages": [2, 5]}, 1, "rank 0: blocks 0-6"),  # a node was lost
        (
            {"pipelines": 2},
            5,
            "rank 0: blocks 0-2 > rank 1: blocks 3-4 > rank 2: blocks 5-6 | rank 3: blocks 0-3 > rank 4: blocks 4-6",
        ),
        ({"pipelines": 2}, 3, "rank 0: blocks 0-2 > rank 1: blocks 3-4 > rank 2: blocks 5-6"),
        (
            {"pipelines": 2, "stages": [1, 6, 5, 2]},
            4,
            "rank 0: blocks 0-0 > rank 1: blocks 1-6 | rank 2: blocks 0-4 > rank 3: blocks 5-6",
        ),
    ],
)
def test_layouts(topology: dict[str, object], world_size: int, shown: str) -> None:
    settings = config_of(**topology).topology
    check_layout(settings, 7, world_size)
    assert str(decide_layout(settings, [1.0] * 7, world_size)) == shown


def test_blocks_are_cut_by_what_they_cost() -> None:
    """Sixteen of 32 blocks are trained, and cost twice or three times as much as the others."""

    def counts(costs: Sequence[float], world_size: int) -> list[int]:
        layout = decide_layout(config_of().topology, costs, world_size)
        return [len(stage.blocks) for stage in layout.pipelines[0]]

    assert counts([1.0] * 16 + [2.0] * 16, 2) == [20, 12]
    assert counts([1.0] * 16 + [3.0] * 15 + [6.0], 2) == [22, 10]
    assert counts([1.0] * 16 + [3.0] * 16, 4) == [12, 8, 6, 6]  # no more than one and a half times an even share
    assert counts([1.0] * 31 + [50.0], 2) == [24, 8]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=9), st.integers(1, 4), st.integers(1, 9))
def test_no_cut_is_better(costs: list[int], stages: int, most: int) -> None:
    stages = min(stages, len(costs))
    most = max(most, -(-len(costs) // stages))

    def worst(inner: Sequence[int]) -> int:
        ends = [0, *inner, len(costs)]
        pairs = list(pairwise(ends))
        return max(sum(costs[first:end]) if end - first <= most else 10**6 for first, end in pairs)

    (pipeline,) = balanced_layout(costs, range(stages), most).pipelines
    assert [stage.rank for stage in pipeline] == list(range(stages))
    best = min(worst(inner) for inner in combinations(range(1, len(costs)), stages - 1))
    assert worst([stage.first for stage in pipeline[1:]]) == best


def test_more_ranks_than_blocks_have_joined() -> None:
    layout = decide_layout(config_of().topology, [1.0] * 2, 4)
    assert layout.place_of(2) is layout.place_of(3) is None


@pytest.mark.parametrize(
    ("topology", "world_size", "message"),
    [
        ({}, 9, "pipelines of 9 stages are more than the model's 7 blocks allow; use topology.pipelines=2"),
        ({}, 15, "7 blocks allow; use topology.pipelines=3, fewer nodes"),
        ({"stages": [2, 4]}, 2, r"topology.stages: \[2, 4\] are 6 blocks, and the model has 7"),
        ({"pipelines": 2, "stages": [2, 5, 7, 1]}, 4, r"topology.stages: \[7, 1\] are 8 blocks"),
    ],
)
def test_layouts_that_cannot_be(topology: dict[str, object], world_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_layout(config_of(**topology).topology, 7, world_size)


def test_no_more_pipelines_are_named_than_the_nodes_can_form() -> None:
    with pytest.raises(ConfigError, match="more than the model's 2 blocks allow; use fewer nodes, or "):
        check_layout(config_of().topology, 2, 3)


def test_a_plan_has_the_macs_that_it_names() -> None:
    config = config_of(kind="single", nodes=1, pipelines=2)
    config.plan.chips = ["3x M2 8GB"]
    assert [line.partition(";")[0] for line in problems(config)] == ["topology.pipelines: 2 pipelines of 3 nodes"]
    config.topology.placement, config.topology.pipelines, config.training.batch_size = "auto", 1, 2
    assert [line.partition(";")[0] for line in problems(config)] == [
        "training.batch_size: 2 rows can't be shared by 3 nodes"
    ]


def stages(budget: float, rank: int = 0, wanted: int | str = "auto") -> StagePlanner:
    """A stage of a llama of eight blocks, on a device that computes with MLX's operations."""
    shape = shape_of(configuration("llama") | {"num_hidden_layers": 8}, "config.json")
    execution = resolve(ModelConfig(), shape.checkpoint, METAL, packing="false", micro_batch_size=2).pipelined(0)
    planner = MemoryPlanner(shape, execution, AdapterConfig(), "adamw", [unlike_rows(8, 64, 60)], validation_rows=0)
    return StagePlanner(planner, budget, even_layout(8, range(2)), rank, 0, wanted, may_keep=True)


def test_a_stage_keeps_what_fits() -> None:
    """First blocks in memory, then what the backward pass needs of them."""
    roomy = stages(1e12).decide()
    assert (roomy.block_capacity, roomy.resident_blocks) == (8, (0, 1, 2, 3))
    assert roomy.activation_capacity >= 4 * 2  # blocks of two micro-batches
    own = stages(0).parts(4).peak
    tight = stages(own).decide()
    assert (tight.block_capacity, tight.resident_blocks) == (4, (0, 1, 2, 3))
    assert tight.activation_capacity == 0
    assert stages(0).predicted(roomy).peak > stages(0).predicted(tight).peak == own
    one = stages(stages(0).parts(1).peak).decide()
    assert one.block_capacity == 1
    assert one.resident_blocks == (2,)
    assert stages(1e12, wanted=1).decide().block_capacity == 1
    assert stages(stages(0).parts(1).peak, wanted=6).decide().block_capacity == 1  # no more than fit
    with pytest.raises(ConfigError, match="even with its blocks read from disk a stage would need about"):
        stages(0).decide()


def test_the_last_stage_holds_fewer_micro_batches_and_only_that_one_computes_losses() -> None:
    first, last = (stages(0, rank=rank).parts(8) for rank in (0, 1))
    assert last.activations < first.activations
    assert first.logits == 0 < last.logits
