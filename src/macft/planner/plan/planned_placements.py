"""The placements that a planned run could have, and which one it would choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from macft.errors import ConfigError
from macft.model.execution import Execution
from macft.planner.memory import MemoryParts
from macft.planner.placement.candidates import FoundPipelines, is_roomy, run_pipelines, whole_model_placements
from macft.planner.placement.cluster_model import Node, RingLinks
from macft.planner.placement.compare import LayoutDecision, preferred, set_pipelines, why_no_pipeline
from macft.planner.placement.configured_layout import block_costs, decide_layout
from macft.planner.placement.inputs import can_pipeline, model_cost, step_work
from macft.planner.plan.node_plans import NodePlan, PlannedWork
from macft.planner.plan.stage_memory import stage_memory
from macft.planner.whole_model import obstacle_to_reading_blocks


@dataclass(frozen=True)
class PlannedPlacements:
    """``decisions``: the best layout of each placement that fits. ``pipelines``: those among them.

    ``stages``: by rank, the memory of its stage in these pipelines. ``refusal``: why there is no pipeline, where the
    configuration asks for one.
    """

    decisions: dict[str, LayoutDecision]
    pipelines: FoundPipelines | None = None
    stages: dict[int, MemoryParts] = field(default_factory=dict)
    refusal: str | None = None


class PlacementPlanner:
    """Finds the placements of ``work`` on nodes that compute as ``execution`` says."""

    def __init__(self, work: PlannedWork, execution: Execution):
        self._work, self._topology = work, work.config.topology
        self._whole = work.whole(execution)
        self._in_pipelines = cache(work.in_pipelines)
        self._obstacle = obstacle_to_reading_blocks(execution, work.shape, work.config.adapter)
        shares = self._topology.shares
        self._shares = tuple(map(float, shares)) if isinstance(shares, list) else None

    def placements(self, nodes: Sequence[Node], ring: RingLinks) -> PlannedPlacements:
        """Those that the configuration allows on ``nodes``, by rank."""
        wanted = self._topology.placement
        kinds = [kind for kind in ("replicate", "stream") if wanted in ("auto", kind)]
        decisions = whole_model_placements(nodes, ring, self._whole, self._shares, kinds=kinds)
        if wanted not in ("auto", "pipeline"):
            return PlannedPlacements(decisions)
        found = self.pipelines(nodes, ring)
        if found is None:
            return PlannedPlacements(decisions, refusal=self._no_pipeline(nodes) if wanted == "pipeline" else None)
        layout = found.best.layout
        whole = self._in_pipelines(len(layout.pipelines))
        try:
            stages = stage_memory(self._work.config, layout, whole, self._work.steps, nodes)
        except ConfigError as error:  # a node of the run would refuse its stage
            return PlannedPlacements(decisions, refusal=str(error) if wanted == "pipeline" else None)
        return PlannedPlacements({**decisions, "pipeline": found.best}, found, stages)

    def best_pipelines(self, nodes: Sequence[Node], ring: RingLinks) -> LayoutDecision | None:
        """The pipelines that the run would have on ``nodes``; None if none fit, or no pipeline is for its settings."""
        found = self.pipelines(nodes, ring)
        return None if found is None else found.best

    def pipelines(self, nodes: Sequence[Node], ring: RingLinks) -> FoundPipelines | None:
        """As :meth:`best_pipelines`, with the best of all nodes in their order."""
        topology, config = self._topology, self._work.config
        if len(nodes) < 2 or self._obstacle is not None or not can_pipeline(config):
            return None
        if topology.placement != "pipeline":
            counts = range(1, config.training.batch_size + 1)
            return run_pipelines(nodes, ring, self._in_pipelines, self._shares, counts=counts)
        is_set = isinstance(topology.stages, list) and len(topology.stages) == len(nodes)
        # Processes of one machine don't measure it: their run takes them as alike.
        is_alike = topology.kind == "local" and not config.plan.chips
        if not (is_set or is_alike):
            return run_pipelines(nodes, ring, self._in_pipelines, self._shares, counts=[topology.pipelines])
        planner = self._in_pipelines(topology.pipelines)
        costs = block_costs(planner.shape, planner.first_trained, keeps=planner.execution.may_keep_activations)
        layout = decide_layout(topology, costs, len(nodes))
        work = step_work(planner, planner.execution.micro_batch_size, self._shares)
        decision = set_pipelines(nodes, ring, model_cost(planner), work, layout)
        return None if decision is None else FoundPipelines(decision, decision)

    def _no_pipeline(self, nodes: Sequence[Node]) -> str:
        """Why there is none, in one line that begins with the key."""
        if self._obstacle:
            return f"topology.placement: pipeline {self._obstacle}"
        return why_no_pipeline(nodes, model_cost(self._whole))


def choose_placement(wanted: str, plans: Sequence[NodePlan], decisions: Mapping[str, LayoutDecision]) -> str | None:
    """What the run chooses of ``decisions``, None if it can't be made; ``wanted`` is ``topology.placement``."""
    if not decisions:
        return None
    if wanted == "auto" and any(plan.smaller_batch_fits for plan in plans):
        return None  # a smaller micro-batch is the faster way
    if "replicate" in decisions and all(plan.refusal is None and is_roomy(plan.execution) for plan in plans):
        return "replicate"
    return preferred(decisions)
