"""The plan of a whole run: what each node would hold, whether it fits, how fast it would be. Nothing is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from macft.config.execution import execution_for
from macft.config.schema import TrainConfig
from macft.config.validate import world_size
from macft.data.load import read, rows_to_tokenize, tokenize_all
from macft.data.order import RowOrder
from macft.data.template_clock import fix_clock
from macft.device.chips import Mac, find_macs
from macft.device.disk_speed import disk_speed
from macft.device.kind import METAL, Device
from macft.device.memory import usable_bytes
from macft.errors import ConfigError, DataError, MacftError, ModelError
from macft.model.execution import Execution
from macft.model.fetch.bundled import ensure_bundled
from macft.model.load import load_tokenizer
from macft.model.shape import ModelShape
from macft.network.link_kinds import LinkKind, find_links
from macft.parallel.shares import DataShard
from macft.planner.fit import MemoryPlanner
from macft.planner.known_models import find_shape
from macft.planner.memory import MemoryParts, trained_part
from macft.planner.node_part import planner_for, steps_of_shard, whole_model_planner
from macft.planner.packing import choose_packing
from macft.planner.placement.candidates import FoundPipelines, is_roomy, order_line, run_pipelines, whole_models
from macft.planner.placement.cluster_model import Node, NodeLink, RingLinks
from macft.planner.placement.compare import LayoutDecision, preferred, set_pipelines, why_no_pipeline
from macft.planner.placement.configured_layout import block_costs, check_layout, decide_layout
from macft.planner.placement.inputs import alone, can_pipeline, model_cost, step_work
from macft.planner.plan.advice import advice
from macft.planner.plan.stage_memory import stage_memory
from macft.planner.speed import chip_speed, own_speed, work_of
from macft.planner.whole_model import WeightPlacement, WholeModelPlanner, obstacle_to_reading_blocks
from macft.planner.workload import StepRows, assumed_steps, steps_of
from macft.topology.settings import parse_budget
from macft.training.settings import steps_for

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class NodePlan:
    """One node with the whole model: ``execution`` is what it would run with, ``refusal`` says why it can't."""

    name: str
    budget: float
    rows: int
    execution: Execution
    layout: WeightPlacement
    parts: MemoryParts
    refusal: str | None
    watts: float | None


@dataclass(frozen=True)
class RunPlan:
    """All nodes, and the best layout of each placement that fits; ``chosen`` is that of the run, None if it can't be.

    ``stages``: by rank, the memory of its stage in the best pipelines, as a run predicts it; of nodes that have one.
    ``tokens`` of all rows in each of ``steps``. ``advice`` says what would help, ``notes`` what the figures rest on.
    ``refusal``: why there is no pipeline, where one was asked for.
    """

    model: str
    shape: ModelShape
    trainable: int
    nodes: list[NodePlan]
    placements: dict[str, LayoutDecision]
    chosen: str | None
    steps: int
    tokens: float
    notes: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    refusal: str | None = None
    stages: dict[int, MemoryParts] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether the run can be made."""
        return self.chosen is not None


def plan_run(config: TrainConfig, *, progress: Progress | None = None) -> RunPlan:
    """Plans ``config`` for ``plan.chips``, or for as many nodes like this machine as its topology has.

    ``progress`` is called with what is done, and how many of how many rows; 0 of 0 where there is no count.

    Raises:
        ConfigError: the nodes, the model or the device can't do what ``config`` asks for.
        ModelError: nothing is known of the model's shape.
        DataError: the dataset can't be read.
    """
    notes: list[str] = []
    tell = progress or (lambda *_: None)
    macs = find_macs(config.plan.chips)
    count = len(macs) or world_size(config)
    tell(f"finding the model {config.model.path}", 0, 0)
    shape, folder = find_shape(config, notes)
    if config.topology.placement == "pipeline":
        check_layout(config.topology, shape.blocks, count)
    steps, total_steps = _steps(config, folder, notes, tell)
    tell("measuring this machine", 0, 0)
    device = METAL if macs else Device.default().shared_by(_nodes_here(config, macs))
    # The same for all nodes, which are of a kind.
    whole_steps = planner_for(config, shape, execution_for(config, shape, shape.checkpoint, device), steps)
    execution, packing_notes = choose_packing(whole_steps)
    notes += packing_notes
    tokens = sum(float(step.lengths.sum()) for step in steps) / len(steps)
    speeds = [chip_speed(mac.chip, execution.dtype) for mac in macs]
    speeds = speeds or _own_speeds(config, count, work_of(whole_steps), execution, notes)
    disks = [mac.chip.disk * 1e9 for mac in macs] or _own_disks(count, notes)
    shares = tuple(map(float, config.topology.shares)) if isinstance(config.topology.shares, list) else None
    plans, nodes, wanted, is_batch_too_large = [], [], config.topology.placement, False
    for rank, (speed, disk) in enumerate(zip(speeds, disks, strict=True)):
        whole_model = _whole_model(
            config, shape, execution, steps, DataShard(rank, count, shares or tuple(speeds)), macs
        )
        plan = _plan_node(_name(macs, rank, count), whole_model, macs[rank] if macs else None)
        ways = () if plan.refusal is not None else (alone(whole_model, plan.execution, speed=speed, disk=disk),)
        is_batch_too_large |= plan.refusal is not None and whole_model.planner.best(whole_model.budget) is not None
        plans.append(plan)
        nodes.append(Node(plan.name, speed, plan.budget, disk, ways))
    whole = _whole_model(config, shape, execution, steps, DataShard(0, 1), macs).planner
    links = find_links(config.plan.link)
    ring = _ring(links, count)

    @cache
    def planner_of(pipelines: int) -> MemoryPlanner:
        topology = replace(config.topology, placement="pipeline", pipelines=pipelines)
        asked = execution_for(replace(config, topology=topology), shape, shape.checkpoint, device)
        chosen, _ = choose_packing(planner_for(config, shape, asked, steps))
        return _whole_model(config, shape, replace(chosen, lanes=1), steps, DataShard(0, 1), macs).planner

    obstacle = obstacle_to_reading_blocks(execution, shape, config.adapter)
    can_be_cut = can_pipeline(config) and obstacle is None

    def pipelines_of(nodes: Sequence[Node], ring: RingLinks) -> FoundPipelines | None:
        return _pipelines(config, nodes, ring, planner_of, shares) if can_be_cut and len(nodes) > 1 else None

    def best_pipelines_of(nodes: Sequence[Node], ring: RingLinks) -> LayoutDecision | None:
        found = pipelines_of(nodes, ring)
        return None if found is None else found.best

    kinds = [kind for kind in ("replicate", "stream") if wanted in ("auto", kind)]
    placements = whole_models(nodes, ring, whole, shares, kinds=kinds)
    found = pipelines_of(nodes, ring) if wanted in ("auto", "pipeline") else None
    refusal: str | None = None
    stages: dict[int, MemoryParts] = {}
    if found is not None:
        layout = found.best.layout
        try:
            stages = stage_memory(config, layout, planner_of(len(layout.pipelines)), steps, nodes)
            placements["pipeline"] = found.best
        except ConfigError as error:  # a node of the run would refuse its stage
            found, refusal = None, str(error) if wanted == "pipeline" else None
    is_refused = wanted == "auto" and is_batch_too_large  # a smaller micro-batch is the faster way
    chosen = _preferred(plans, placements) if placements and not is_refused else None
    notes += _link_notes(links, config, speeds)
    if found is not None and (line := order_line(found, [node.name for node in nodes])):
        notes.append(f"pipeline: {line}")
    if wanted == "pipeline" and found is None and refusal is None:
        refusal = f"topology.placement: pipeline {obstacle}" if obstacle else why_no_pipeline(nodes, model_cost(whole))
    return RunPlan(
        model=config.model.path,
        shape=shape,
        trainable=trained_part(shape, config.adapter).parameters,
        nodes=plans,
        placements=placements,
        chosen=chosen,
        steps=total_steps,
        tokens=tokens,
        notes=notes,
        advice=advice(
            nodes,
            ring,
            placements,
            chosen,
            best_pipelines_of,
            is_quantized=whole.execution.bits is not None,
            is_batch_too_large=is_batch_too_large,
        ),
        refusal=refusal,
        stages=stages,
    )


def _pipelines(
    config: TrainConfig,
    nodes: Sequence[Node],
    ring: RingLinks,
    planner_of: Callable[[int], MemoryPlanner],
    shares: tuple[float, ...] | None,
) -> FoundPipelines | None:
    """The pipelines that a run of ``config`` on ``nodes`` would have; None if none fit."""
    topology = config.topology
    if topology.placement != "pipeline":
        counts = range(1, config.training.batch_size + 1)
        return run_pipelines(nodes, ring, planner_of, shares, counts=counts)
    is_set = isinstance(topology.stages, list) and len(topology.stages) == len(nodes)
    # Processes of one machine don't measure it: their run takes them as alike.
    is_alike = topology.kind == "local" and not config.plan.chips
    if not (is_set or is_alike):
        return run_pipelines(nodes, ring, planner_of, shares, counts=[topology.pipelines])
    planner = planner_of(topology.pipelines)
    costs = block_costs(planner.shape, planner.first_trained, keeps=planner.execution.may_keep_activations)
    layout = decide_layout(topology, costs, len(nodes))
    work = step_work(planner, planner.execution.micro_batch_size, shares)
    decision = set_pipelines(nodes, ring, model_cost(planner), work, layout)
    return None if decision is None else FoundPipelines(decision, decision)


def _preferred(plans: Sequence[NodePlan], placements: dict[str, LayoutDecision]) -> str:
    """What the run chooses of ``placements``."""
    if "replicate" in placements and all(plan.refusal is None and is_roomy(plan.execution) for plan in plans):
        return "replicate"
    return preferred(placements)


def _nodes_here(config: TrainConfig, macs: Sequence[Mac]) -> int:
    """Nodes that share a machine."""
    return config.topology.nodes if not macs and config.topology.kind == "local" else 1


def _whole_model(
    config: TrainConfig,
    shape: ModelShape,
    execution: Execution,
    steps: Sequence[StepRows],
    shard: DataShard,
    macs: Sequence[Mac],
) -> WholeModelPlanner:
    """What decides how the node at ``shard`` computes."""
    mac, nodes_here = macs[shard.rank] if macs else None, _nodes_here(config, macs)
    own = steps_of_shard(config, steps, shard, execution)
    # A node far slower than the others may be left without a row; it still holds the model.
    own = [step for step in own if step.rows] or [StepRows(steps[0].rows[:1], steps[0].ids[:1])]
    budget = parse_budget(config.topology.memory_budget, mac.usable_bytes if mac else usable_bytes(1 / nodes_here))
    return whole_model_planner(config, planner_for(config, shape, execution, own), budget)


def _plan_node(name: str, whole_model: WholeModelPlanner, mac: Mac | None) -> NodePlan:
    chosen, refusal = whole_model.choice()
    return NodePlan(
        name=name,
        budget=whole_model.budget,
        rows=whole_model.planner.rows,
        execution=chosen,
        layout=WeightPlacement.of(whole_model.planner.shape, chosen, whole_model.first_trained),
        parts=whole_model.parts(chosen),
        refusal=refusal,
        watts=mac.chip.watts if mac else None,
    )


def _name(macs: Sequence[Mac], rank: int, count: int) -> str:
    """The node's name, with a number where several have the same."""
    if not macs:
        return "this machine" if count == 1 else f"this machine, rank {rank}"
    same = [number for number, mac in enumerate(macs) if mac.name == macs[rank].name]
    return macs[rank].name if len(same) == 1 else f"{macs[rank].name} #{same.index(rank) + 1}"


def _ring(links: Sequence[LinkKind], count: int) -> RingLinks:
    """The links of ``count`` nodes in ring order; the last one is between the last node and the first."""
    made = [NodeLink(link.bandwidth, link.latency) for link in links]
    return RingLinks(tuple(made if len(made) == count else made[:1] * count))


def _link_notes(links: Sequence[LinkKind], config: TrainConfig, speeds: Sequence[float]) -> list[str]:
    count, shares = len(speeds), config.topology.shares
    if count < 2:
        return []
    names = ", ".join(link.name for link in (links if len(links) == count else links[:1]))
    how = f"as topology.shares={shares} says" if isinstance(shares, list) else "by speed"
    if shares == "equal" and len(set(speeds)) > 1:
        how += ", as topology.shares=auto does"
    return [f"nodes are connected by {names} (plan.link); rows are divided {how}"]


def _own_speeds(config: TrainConfig, count: int, work: float, execution: Execution, notes: list[str]) -> list[float]:
    """Operations a second that training reaches on this machine, for each node; ``work``: parameters times tokens."""
    if config.topology.kind in ("hosts", "ssh"):
        notes.append("every host is taken to be a machine like this one; --chips names other Macs")
    speed = own_speed(work / count, execution)
    notes.append(f"this machine trains with {speed.operations_per_second / 1e12:.2g} TFLOPS, {speed.origin}")
    return [speed.operations_per_second / _nodes_here(config, ())] * count


def _own_disks(count: int, notes: list[str]) -> list[float]:
    """Bytes a second that the disk of this machine reads, for each node of the topology."""
    disk = disk_speed()
    origin = {
        "measured": "measured by macft doctor",
        "table": "as reported for its chip; macft doctor measures it",
        "assumed": "assumed; macft doctor measures it",
    }
    notes.append(f"the disk reads {disk.bytes_per_second / 1e9:.1f} GB/s, {origin[disk.source]}")
    return [disk.bytes_per_second] * count


def _steps(config: TrainConfig, folder: Path | None, notes: list[str], tell: Progress) -> tuple[list[StepRows], int]:
    """The run's batches and its number of updates; rows of the longest length where they can't be tokenised here."""
    batch_size, longest = config.training.batch_size, config.dataset.max_seq_length
    tell("reading the dataset", 0, 0)
    raw = read(config.dataset, seed=config.seed)
    sizes = [len(splits["train"]) for _, splits in raw]
    order = RowOrder(sizes, [source.weight for source, _ in raw], batch_size=batch_size, seed=config.seed)
    folder = folder or _any_tokenizer(config, notes)
    try:
        if folder is None:
            raise ModelError("no tokenizer")
        tokenizer = load_tokenizer(config.model, folder)
        fix_clock(tokenizer, config.dataset.template_time)
        total = rows_to_tokenize(raw, need_test=False)
        data = tokenize_all(
            raw, config.dataset, tokenizer, need_test=False, progress=lambda done: tell("tokenizing", done, total)
        )
    except DataError:
        raise
    except (MacftError, json.JSONDecodeError) as error:
        notes.append(f"all rows are taken to have {longest} tokens (dataset.max_seq_length): {error}")
        return assumed_steps(batch_size, longest), steps_for(config.training, order.steps_per_epoch)
    order = RowOrder(data.train.source_sizes, data.train.source_weights, batch_size=batch_size, seed=config.seed)
    steps = steps_for(config.training, order.steps_per_epoch)
    return steps_of(data.train.rows, order, steps), steps


def _any_tokenizer(config: TrainConfig, notes: list[str]) -> Path | None:
    """The bundled model's folder, whose tokenizer stands in for that of a model that isn't here."""
    try:
        folder = ensure_bundled()
    except ModelError:
        return None
    notes.append(f"rows are counted in tokens of SmolLM2, as {config.model.path} is not on this machine")
    return folder
