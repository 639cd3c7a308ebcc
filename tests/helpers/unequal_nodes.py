"""A model in blocks and nodes of unequal speeds, to be cut into stages."""

from __future__ import annotations

from collections.abc import Sequence

from harness.families import configuration
from macft.device.kind import METAL
from macft.model.adapters.settings import AdapterConfig
from macft.model.execution import resolve
from macft.model.settings import ModelConfig
from macft.model.shape import shape_of
from macft.parallel.stage_layout import StageLayout
from macft.planner.memory_planner import MemoryPlanner
from macft.planner.placement.cluster_model import Node, NodeLink
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
    """Nodes of ``speeds`` in TFLOPS and ``memories`` in bytes, more than enough if there are none; links are free."""
    sizes = memories or [1e12] * len(speeds)
    return [
        Node(f"rank {rank}", 1e12 * speed, memory, 3e9, link=NodeLink(1e15, 0.0))
        for rank, (speed, memory) in enumerate(zip(speeds, sizes, strict=True))
    ]


def counts(layout: StageLayout | None) -> list[list[int]]:
    """Blocks of each stage of each pipeline."""
    assert layout is not None
    return [[len(stage.blocks) for stage in stages] for stages in layout.pipelines]
