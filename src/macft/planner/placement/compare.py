"""Chooses a placement: which node holds which blocks, so that a step is fastest among what fits.

Every placement is a set of pipelines, and a pipeline of one stage is a node by itself. So all are compared by one
clock: the time of the whole step, with the filling and draining of pipelines, reading, and the exchange of gradients.
How pipelines are found is in :mod:`macft.planner.placement.pipeline_search`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from macft.parallel.stage_layout import StageLayout
from macft.planner.placement.cluster_model import CHOICES, Alone, ModelCost, Node, RingLinks, StepWork
from macft.planner.placement.pipeline_search import Pipeline, PipelineSearch, alone_pipeline, deal
from macft.planner.placement.stage_costs import StageChoice

# Of the time that a step takes with whole models, what it may take at most with a pipeline for that to be chosen.
_INSTEAD_OF = {"replicate": 0.9, "stream": 0.95}
# The same for another order of the stages, or fewer nodes: the ring's order follows the links.
_ANOTHER_ORDER = 0.95


@dataclass(frozen=True)
class LayoutDecision:
    """A placement, and what a step takes with it.

    ``placement`` is "replicate", "stream" or "pipeline". ``choices`` are those of the stages, in the order of
    ``layout``. ``micro_batches`` of each pipeline. ``seconds`` of a step, of which ``exchange`` for the gradients.
    ``bubble``: the share of the rest in which the nodes of the layout wait, on average. ``disk``: the most seconds that
    a node reads in a step, while it computes or not. ``wire``: the most seconds that a link between two stages is busy
    in one direction.
    """

    placement: str
    layout: StageLayout
    choices: tuple[tuple[StageChoice, ...], ...]
    micro_batches: tuple[int, ...]
    seconds: float
    exchange: float
    bubble: float
    disk: float
    wire: float

    def choice_of(self, rank: int) -> StageChoice | None:
        """How ``rank`` holds its stage; None if it has none."""
        place = self.layout.place_of(rank)
        return self.choices[place[0]][place[1]] if place else None

    @property
    def ranks(self) -> list[int]:
        """Those that compute."""
        return sorted(stage.rank for pipeline in self.layout.pipelines for stage in pipeline)


def preferred(found: Mapping[str, LayoutDecision]) -> str:
    """What ``topology.placement=auto`` chooses of these placements: the fastest, but a pipeline only if that is clear.

    Nodes that have the whole model are worth something: rows move freely between them, and a lost node costs no time.
    """
    whole = min((kind for kind in found if kind != "pipeline"), key=lambda kind: found[kind].seconds, default=None)
    if whole is None:
        return "pipeline"
    pipeline = found.get("pipeline")
    is_faster = pipeline is not None and pipeline.seconds <= _INSTEAD_OF[whole] * found[whole].seconds
    return "pipeline" if is_faster else whole


def best_pipelines(
    nodes: Sequence[Node], ring: RingLinks, model: ModelCost, step: StepWork, pipelines: int = 1
) -> tuple[LayoutDecision | None, LayoutDecision | None]:
    """The layout of exactly this many pipelines for a run, and the best one of all nodes in their order; None if none.

    The first is the second unless another order of the stages, or fewer nodes, are clearly faster.
    """
    orders = [
        compare(nodes, ring, model, step, kinds=["pipeline"], order=order, pipelines=pipelines).get("pipeline")
        for order in ("given", "free")
    ]
    given, free = orders
    if given is None or (free is not None and free.seconds <= _ANOTHER_ORDER * given.seconds):
        return free, given
    return given, given


def set_pipelines(
    nodes: Sequence[Node], ring: RingLinks, model: ModelCost, step: StepWork, layout: StageLayout
) -> LayoutDecision | None:
    """What a step takes with the stages of ``layout``, which somebody else has chosen; None if one doesn't fit."""
    count = step.divisions()[0]
    search = PipelineSearch(nodes, ring, model, step, count, "given", len(layout.pipelines))
    if not all(search.fits(stages) for stages in layout.pipelines):
        return None
    pipelines = [search.pipeline(stages) for stages in layout.pipelines]
    shares = search.shares_of([[stage.rank for stage in stages] for stages in layout.pipelines])
    dealt = deal([pipeline.clock for pipeline in pipelines], count, shares)
    return _decision("pipeline", pipelines, dealt, ring.all_reduce(model.exchanged, len(nodes)))


def compare(
    nodes: Sequence[Node],
    ring: RingLinks,
    model: ModelCost,
    step: StepWork,
    *,
    kinds: Sequence[str] = CHOICES,
    order: str = "ring",
    pipelines: int | None = None,
) -> dict[str, LayoutDecision]:
    """The best layout of each kind that fits, by kind.

    Under "replicate" every node holds the whole model in memory. Under "stream" every node computes with the whole
    model, and at least one reads blocks from disk. Under "pipeline" at least two nodes share a model; nodes may be left
    out, and stages may read blocks from disk. ``order``: "ring", the stages of a pipeline follow each other around the
    ring, from any node on, "free", or "given": all nodes form pipelines, in their order. ``pipelines``: how many there
    are, of two or more nodes each; None: as many as are best, one under "given".

    Under "replicate" rows are dealt by speed, as ``topology.shares=auto`` deals them, otherwise as ``step`` says.
    """
    found: dict[str, LayoutDecision] = {}
    exchange = ring.all_reduce(model.exchanged, len(nodes))
    for kind in ("replicate", "stream"):
        ways = _ways_alone(nodes, step, kind)
        if kind in kinds and ways is not None:
            tokens = step.tokens / step.rows
            alone = [alone_pipeline(rank, way, model, tokens) for rank, way in enumerate(ways)]
            shares = None if kind == "replicate" else step.shares
            dealt = deal([pipeline.clock for pipeline in alone], step.rows, shares)
            found[kind] = _decision(kind, alone, dealt, exchange)
    if "pipeline" in kinds and len(nodes) > 1 and model.blocks > 1:
        searches = [PipelineSearch(nodes, ring, model, step, count, order, pipelines) for count in step.divisions()]
        decisions = [_decision("pipeline", *best, exchange) for each in searches if (best := each.best()) is not None]
        if decisions:
            found["pipeline"] = min(decisions, key=lambda decision: decision.seconds)
    return found


def why_no_pipeline(nodes: Sequence[Node], model: ModelCost) -> str:
    """Why no pipeline of two or more ``nodes`` can be, in one line that begins with the key."""
    if model.blocks < 2:
        return "topology.placement: a model of one block can't be cut; use topology.placement=replicate or stream"
    memory = ", ".join(f"{node.memory / 1e9:.1f}" for node in nodes)
    return (
        f"topology.memory_budget: no pipeline fits the memory of the nodes ({memory} GB), with weights of "
        f"{model.weights / 1e9:.1f} GB; shorter or fewer rows (dataset.max_seq_length, training.micro_batch_size), "
        "fewer bits or another node would help"
    )


def _ways_alone(nodes: Sequence[Node], step: StepWork, kind: str) -> list[Alone] | None:
    """How each node computes with the whole model; None if one can't, or if none streams and ``kind`` is "stream"."""
    ways = []
    for node in nodes:
        options = [way for way in node.alone if kind == "stream" or not way.streams]
        if not options:
            return None
        share = step.tokens / len(nodes)
        ways.append(min(options, key=lambda way: max(way.per_token * share, way.reading)))
    if kind == "stream" and not any(way.streams for way in ways):
        ways = [next((way for way in node.alone if way.streams), way) for node, way in zip(nodes, ways, strict=True)]
    return ways if kind == "replicate" or any(way.streams for way in ways) else None


def _decision(kind: str, pipelines: Sequence[Pipeline], dealt: Sequence[int], exchange: float) -> LayoutDecision:
    """The decision for ``pipelines`` that get ``dealt`` micro-batches."""
    pairs = list(zip(pipelines, dealt, strict=True))
    seconds = max(pipeline.simulated(count) for pipeline, count in pairs)
    stages = [(choice, pipeline.alone, count) for pipeline, count in pairs for choice in pipeline.choices]
    busy = [count * choice.cost.busy for choice, _, count in stages]
    return LayoutDecision(
        placement=kind,
        layout=StageLayout(tuple(pipeline.stages for pipeline in pipelines)),
        choices=tuple(pipeline.choices for pipeline in pipelines),
        micro_batches=tuple(dealt),
        seconds=seconds + exchange,
        exchange=exchange,
        bubble=max(0.0, 1 - sum(busy) / len(busy) / seconds) if seconds else 0.0,
        # A node with the whole model reads it once for all of its rows, and not at all if it has none.
        disk=max(choice.reading * (min(1, count) if alone else count) for choice, alone, count in stages),
        wire=max(choice.cost.wire * count for choice, _, count in stages),
    )
