"""The placements that a run could have: whole models and pipelines, each the best of its kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from macft.config.schema import TrainConfig
from macft.model.execution import Execution
from macft.planner.memory_planner import MemoryPlanner
from macft.planner.placement.cluster_model import Node, RingLinks
from macft.planner.placement.compare import LayoutDecision, best_pipelines, compare
from macft.planner.placement.configured_layout import pipeline_sizes
from macft.planner.placement.inputs import model_cost, step_work


class FoundPipelines(NamedTuple):
    """``best``, and ``in_order``: that of all nodes in the order of ranks; None where there is none."""

    best: LayoutDecision
    in_order: LayoutDecision | None


def find_pipelines(
    nodes: Sequence[Node],
    ring: RingLinks,
    planner: MemoryPlanner,
    pipelines: int,
    shares: tuple[float, ...] | None,
) -> FoundPipelines | None:
    """Layouts of ``nodes``, by rank, for all rows of ``planner`` in its micro-batches; None if none fits."""
    count = len(pipeline_sizes(pipelines, len(nodes)))
    work = step_work(planner, planner.execution.micro_batch_size, shares)
    best, in_order = best_pipelines(nodes, ring, model_cost(planner), work, count)
    return None if best is None else FoundPipelines(best, in_order)


def order_line(found: FoundPipelines, names: Sequence[str]) -> str:
    """Why not all nodes have a stage in the order of ranks, for a person; empty where they have.

    ``names``: of the nodes, by rank.
    """
    best, in_order = found
    used = [stage.rank for stages in best.layout.pipelines for stage in stages]
    if used == list(range(len(names))):
        return ""
    spare = [name for rank, name in enumerate(names) if rank not in used]
    what = "stages in another order than the nodes"
    if spare:
        what = f"no stage for {', '.join(spare)}: a spare, which takes blocks when another node is lost"
    if best is in_order:
        return f"{what}; there are more nodes than blocks"
    if in_order is None:
        return f"{what}; all nodes in their order have no layout that fits"
    return f"{what}; {best.seconds:.2f} s a step expected, {in_order.seconds:.2f} s with all nodes in their order"


def rank_names(count: int) -> list[str]:
    """``rank 0``, ``rank 1`` and so on, ``count`` of them."""
    return [f"rank {rank}" for rank in range(count)]


def is_roomy(execution: Execution) -> bool:
    """Whether a node that computes the whole model so has room for it, so that no other placement is looked for."""
    return execution.placement == "replicate" and execution.recompute != "blocks"


def run_placements(
    nodes: Sequence[Node],
    ring: RingLinks,
    planner_of: Callable[[int], MemoryPlanner],
    shares: tuple[float, ...] | None,
    *,
    counts: Sequence[int],
) -> tuple[dict[str, LayoutDecision], FoundPipelines | None]:
    """The best layout of each placement that fits, as a run would have it, and the pipelines among them.

    For the arguments see :func:`run_pipelines`.
    """
    found = whole_model_placements(nodes, ring, planner_of(1), shares)
    best = run_pipelines(nodes, ring, planner_of, shares, counts=counts)
    if best is not None:
        found["pipeline"] = best.best
    return found, best


def whole_model_placements(
    nodes: Sequence[Node],
    ring: RingLinks,
    planner: MemoryPlanner,
    shares: tuple[float, ...] | None,
    *,
    kinds: Sequence[str] = ("replicate", "stream"),
) -> dict[str, LayoutDecision]:
    """Those of ``kinds`` that fit; ``planner`` is the prediction for all rows."""
    return compare(nodes, ring, model_cost(planner), step_work(planner, None, shares), kinds=kinds)


def run_pipelines(
    nodes: Sequence[Node],
    ring: RingLinks,
    planner_of: Callable[[int], MemoryPlanner],
    shares: tuple[float, ...] | None,
    *,
    counts: Sequence[int],
) -> FoundPipelines | None:
    """The fastest pipelines of a run, None if none fit.

    ``planner_of``: the prediction for all rows, in the micro-batches of a run with this many pipelines. ``counts``: how
    many pipelines there may be.
    """
    best: FoundPipelines | None = None
    for count in counts:
        if count <= max(1, len(nodes) // 2):
            other = find_pipelines(nodes, ring, planner_of(count), count, shares)
            if other is not None and (best is None or other.best.seconds < best.best.seconds):
                best = other
    return best


def shares_of(config: TrainConfig, count: int) -> tuple[float, ...] | None:
    """How rows are dealt at the start, by rank; None: by speed."""
    shares = config.topology.shares
    if isinstance(shares, list):
        return tuple(map(float, shares))
    return None if shares == "auto" else (1.0,) * count
