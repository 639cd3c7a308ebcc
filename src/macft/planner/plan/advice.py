"""What would make a planned run possible, or faster."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from macft.planner.placement.cluster_model import Node, RingLinks
from macft.planner.placement.compare import LayoutDecision

PipelinesOf: TypeAlias = Callable[[Sequence[Node], RingLinks], LayoutDecision | None]
"""The pipelines that a run on these nodes would have; None if none fit, or no pipeline is for its settings."""
# Something else is named where a step then takes at most this share of the time.
_WORTH_IT = 0.95
_MOST_NODES = 8


def advice(
    nodes: Sequence[Node],
    ring: RingLinks,
    placements: Mapping[str, LayoutDecision],
    chosen: str | None,
    pipelines_of: PipelinesOf,
    *,
    is_quantized: bool,
    is_batch_too_large: bool,
) -> list[str]:
    """Lines for a person. ``placements`` are those that were compared, ``chosen`` is that of the run.

    ``is_batch_too_large``: a smaller micro-batch would make it fit, as the node's own line says.
    """
    lines: list[str] = []
    best = placements[chosen] if chosen is not None else None
    pipeline = placements.get("pipeline") or pipelines_of(nodes, ring)
    if pipeline is not None and chosen != "pipeline" and _is_better(pipeline, best):
        lines.append(f"topology.placement=pipeline would take {pipeline.seconds:.2f} s a step")
    if pipeline is not None and (words := _overrides(pipeline, len(nodes))):
        lines.append(f"for this cut: {words}")
    if is_batch_too_large:
        return lines
    if best is None and not is_quantized:
        lines.append("a model in 4 bits needs about a quarter of the memory of one in 16")
    if (best is None or best.disk > 0) and (pipeline is None or pipeline.disk > 0):
        lines += _more(nodes, ring, best, pipelines_of)
    return lines


def _overrides(pipeline: LayoutDecision, nodes: int) -> str:
    """The words that ask for this cut; empty if none do: ranks form equal groups, in their order."""
    stages = [stage for each in pipeline.layout.pipelines for stage in each]
    sizes = {len(each) for each in pipeline.layout.pipelines}
    if [stage.rank for stage in stages] != list(range(nodes)) or len(sizes) > 1:
        return ""
    counts = ",".join(str(len(stage.blocks)) for stage in stages)
    several = f" topology.pipelines={len(pipeline.layout.pipelines)}" if len(pipeline.layout.pipelines) > 1 else ""
    return f"topology.placement=pipeline 'topology.stages=[{counts}]'{several}"


def _is_better(decision: LayoutDecision, best: LayoutDecision | None) -> bool:
    return best is None or decision.seconds <= _WORTH_IT * best.seconds


def _more(nodes: Sequence[Node], ring: RingLinks, best: LayoutDecision | None, pipelines_of: PipelinesOf) -> list[str]:
    """How many more nodes hold the model in memory, where all are alike and wait for their disks."""
    like = replace(nodes[0], alone=())
    if any((node.speed, node.memory) != (like.speed, like.memory) for node in nodes):
        return []
    for count in range(max(2, len(nodes) + 1), _MOST_NODES + 1):
        more = RingLinks.of_one_kind(min(ring.links, key=lambda link: link.bandwidth), count)
        found = pipelines_of([like] * count, more)
        if found is not None and not found.disk and _is_better(found, best):
            name = nodes[0].name.split(" #")[0]
            return [f"{count} x {name} would hold the model in memory, as a pipeline: {found.seconds:.2f} s a step"]
    return []
