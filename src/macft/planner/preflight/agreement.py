"""The placement of a run: decided once, by rank 0, from what all nodes told. The others and newcomers take it over."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from macft.collective.base import Collective
from macft.collective.elastic import ElasticCollective
from macft.collective.matching import Texts
from macft.config.schema import TrainConfig
from macft.errors import ConfigError, ModelError
from macft.model.confirm import obstacle_to_cutting
from macft.parallel.stage_layout import StageLayout
from macft.planner.node_part import NodePart
from macft.planner.placement.candidates import (
    FoundPipelines,
    is_roomy,
    order_line,
    rank_names,
    run_placements,
    shares_of,
)
from macft.planner.placement.cluster_model import Node
from macft.planner.placement.compare import LayoutDecision, preferred
from macft.planner.placement.inputs import can_pipeline
from macft.planner.preflight.hand_over import HandOver
from macft.planner.preflight.member_layouts import LayoutOf, MemberLayouts, agree, followed, members_of
from macft.planner.preflight.node_report import alike, gather_reports, one_of_many_here, own_node, own_report, ring_of
from macft.planner.whole_model import obstacle_to_reading_blocks
from macft.topology.settings import host_paths

PLACEMENT, PIPELINES = "topology.placement", "topology.pipelines"
_OF_PIPELINE, _OF_EACH_NODE = "pipeline", "each node has the whole model"
# What a node tells before anything is measured.
_NOTHING, _PIPELINE, _ROOMY, _TIGHT = b"", b"pipeline", b"roomy", b"tight"


def _unknown(_: int) -> StageLayout | None:
    """The layout of nodes of which nothing is known."""
    return None


@dataclass(frozen=True)
class RunPlacement:
    """What a run's nodes have agreed on.

    ``config`` is the configuration with it, ``settings`` the same for those who join later. ``layout_of`` makes the
    layout of pipelines. ``lines`` say what was chosen and why. ``layouts`` and ``own``: what the nodes, and this one,
    have told for that; None where nothing was asked.
    """

    config: TrainConfig
    settings: Texts
    layout_of: LayoutOf = _unknown
    lines: list[str] = field(default_factory=list)
    layouts: MemberLayouts | None = None
    own: Node | None = None


def hand_over(part: NodePart, collective: Collective, agreed: RunPlacement) -> HandOver | None:
    """What lets stages hand over blocks in the run that was agreed on; None where the user has set their blocks.

    ``part`` is of the agreed configuration.
    """
    topology = part.config.topology
    if topology.placement != "pipeline" or topology.stages != "auto":
        return None
    own, layouts = agreed.own or _own_node(part), agreed.layouts
    if own is None:
        return None
    if layouts is None:
        is_newcomer = part.shard.world_size != collective.world_size
        layouts = _member_layouts(part, collective, [] if is_newcomer else [own] * collective.world_size)
    return HandOver(collective, layouts, own, agreed.layout_of)


def _own_node(part: NodePart) -> Node | None:
    """What this node tells of itself; None where it can't have a part, which its own decision then says."""
    if part.config.topology.kind == "local":
        return one_of_many_here(part.budget)
    try:
        return own_node(part.whole_model.planner, part.budget, address=_address(part))
    except (ConfigError, ModelError):
        return None


def agree_on_placement(part: NodePart, collective: Collective) -> RunPlacement:
    """The placement of the run that ``part`` is this node's part of. A collective call.

    Under ``topology.placement=auto`` nodes with room for the whole model keep it, and nothing is measured. Otherwise
    each node tells its speed, memory, disk and link, and how it would compute alone.

    Raises:
        ConfigError: this node joins a run whose placement isn't that of its configuration.
    """
    config = part.config
    told = _told(collective)
    if told is not None:
        return _taken_over(config, told)
    views = collective.all_gather(_view(part, collective))
    if all(view == _PIPELINE for view in views):
        return _agree_on_pipelines(part, collective)
    if any(view in (_NOTHING, _PIPELINE) for view in views):
        return _settled(config)
    if all(view == _ROOMY for view in views):
        return _settled(config, line="topology.placement=auto chose replicate: the run fits the memory of each node")
    return _chosen_together(part, collective)


def _view(part: NodePart, collective: Collective) -> bytes:
    """What this node knows without measuring."""
    config, topology = part.config, part.config.topology
    if part.shard.world_size != collective.world_size or collective.world_size < 2:
        return _NOTHING
    if topology.placement == "pipeline":
        return _PIPELINE if topology.stages == "auto" and topology.kind != "local" else _NOTHING
    if topology.placement != "auto" or not can_pipeline(config):
        return _NOTHING
    try:
        whole_model, shape = part.whole_model, part.shape
        execution, refusal = whole_model.choice()
    except (ConfigError, ModelError):  # raised once more by the node's own decision
        return _NOTHING
    if refusal is None and is_roomy(execution):
        return _ROOMY
    smaller_fits = refusal is not None and whole_model.planner.best(whole_model.budget) is not None
    if smaller_fits or obstacle_to_reading_blocks(part.execution, shape, config.adapter) is not None:
        return _NOTHING
    return _TIGHT


def _agree_on_pipelines(part: NodePart, collective: Collective) -> RunPlacement:
    """The layout of the pipelines that the configuration asks for."""
    own = _own_node(part)
    nodes = gather_reports(collective, own)
    if not nodes:
        return _settled(part.config)
    layouts = _member_layouts(part, collective, alike(nodes))
    layout_of, line = agree(collective, layouts)
    return replace(_settled(part.config, layout_of, line), layouts=layouts, own=own)


def _chosen_together(part: NodePart, collective: Collective) -> RunPlacement:
    """What rank 0 chooses among all placements."""
    topology = part.config.topology
    own = own_report(part.whole_model, processes=topology.nodes_here, address=_address(part))
    nodes = alike(gather_reports(collective, own))
    choice = _NO_CHOICE
    if collective.rank == 0:
        with contextlib.suppress(ConfigError, ModelError):  # the others wait; each node's own decision raises it again
            choice = choose(part, nodes, lambda: obstacle_to_cutting(part.config.model, part.folder, part.execution))
    best = None if choice.pipelines is None else choice.pipelines.best.layout
    sent = json.dumps([best and best.to_data(), choice.lines]).encode()
    data, lines = json.loads(collective.broadcast(sent))
    if data is None:
        return _settled(part.config, lines=lines)
    layout = StageLayout.from_data(data)
    part = replace(part, config=_as_pipelines(part.config, len(layout.pipelines)))
    layouts = _member_layouts(part, collective, nodes)
    return replace(_settled(part.config, followed(collective, layouts, layout), lines=lines), layouts=layouts, own=own)


@dataclass(frozen=True)
class Choice:
    """What ``topology.placement=auto`` comes to: ``pipelines``, or None: each node has the whole model."""

    placement: str
    pipelines: FoundPipelines | None
    lines: list[str]


_NO_CHOICE = Choice("", None, [])


def choose(part: NodePart, nodes: Sequence[Node], obstacle: Callable[[], str | None]) -> Choice:
    """The placement of ``nodes``, by rank; ``obstacle`` says why the model can't be cut, if that would be best."""
    shares, counts = shares_of(part.config, len(nodes)), range(1, part.config.training.batch_size + 1)
    found, several = run_placements(nodes, ring_of(nodes), part.of_pipelines, shares, counts=counts)
    remark = ""
    if found and preferred(found) == "pipeline" and (reason := obstacle()) is not None:
        found.pop("pipeline")
        remark = f"; the model can't be cut: {reason}"
    if not found:
        return _NO_CHOICE  # each node's own plan says what it lacks
    chosen = preferred(found)
    lines = [f"topology.placement=auto chose {_reasons(found, chosen, nodes)}{remark}"]
    if chosen != "pipeline" or several is None:
        return Choice(chosen, None, lines)
    line = order_line(several, rank_names(len(nodes)))
    return Choice(chosen, several, [*lines, *([line] if line else [])])


def _reasons(found: Mapping[str, LayoutDecision], chosen: str, nodes: Sequence[Node]) -> str:
    """``stream: 2.31 s a step expected, pipeline 3.10 s; replicate doesn't fit rank 1 (mini)``."""
    what = chosen
    reading = any(
        choice.resident < len(stage.blocks)
        for stages, choices in zip(found[chosen].layout.pipelines, found[chosen].choices, strict=True)
        for stage, choice in zip(stages, choices, strict=True)
    )
    if chosen == "pipeline" and reading:
        what = "pipeline, of nodes that read blocks from disk"
    texts = [f"{what}: {found[chosen].seconds:.2f} s a step expected"]
    texts += [f"{kind} {decision.seconds:.2f} s" for kind, decision in found.items() if kind != chosen]
    line = ", ".join(texts)
    if "replicate" not in found:
        lacking = [rank for rank, node in enumerate(nodes) if all(way.streams for way in node.alone)]
        named = ", ".join(f"rank {rank} ({nodes[rank].name})" for rank in lacking[:3])
        line += f"; the whole model doesn't fit the memory of {named}{' and others' if len(lacking) > 3 else ''}"
    return line


def _member_layouts(part: NodePart, collective: Collective, nodes: Sequence[Node]) -> MemberLayouts:
    """Cuts by what ``nodes``, the members by rank, have told; of a newcomer there are none yet."""
    members = members_of(collective)[: len(nodes)]
    shares = shares_of(part.config, len(nodes))
    by_member = None if shares is None else dict(zip(members, shares, strict=False))
    told = dict(zip(members, nodes, strict=True))
    return MemberLayouts(told, part.config.topology.pipelines, part.of_pipelines, by_member)


def _address(part: NodePart) -> str | None:
    """The address at which others reach this node."""
    hosts = part.config.topology.hosts
    if part.config.topology.kind == "local":
        return "127.0.0.1"
    rank = part.shard.rank
    return host_paths(hosts[rank], part.config.topology.port)[0][0] if rank < len(hosts) else None


def _settled(
    config: TrainConfig, layout_of: LayoutOf = _unknown, line: str = "", *, lines: Sequence[str] = ()
) -> RunPlacement:
    topology = config.topology
    settings = {PLACEMENT: _OF_EACH_NODE}
    if topology.placement == "pipeline":
        settings = {PLACEMENT: _OF_PIPELINE, PIPELINES: str(topology.pipelines)}
    return RunPlacement(config, settings, layout_of, [*lines, *([line] if line else [])])


def _told(collective: Collective) -> Texts | None:
    """What a run has told this node, which joins it; None where it is one of the first."""
    if not isinstance(collective, ElasticCollective) or PLACEMENT not in collective.contents:
        return None
    return {key: text for key, text in collective.contents.items() if key in (PLACEMENT, PIPELINES)}


def _taken_over(config: TrainConfig, told: Texts) -> RunPlacement:
    wanted, is_pipeline = config.topology.placement, told[PLACEMENT] == _OF_PIPELINE
    if wanted != "auto" and (wanted == "pipeline") != is_pipeline:
        theirs = "a pipeline" if is_pipeline else "one in which each node has the whole model"
        raise ConfigError(f"topology.placement: {wanted}, and the run that this node joins is {theirs}; use auto")
    if is_pipeline:
        number = told.get(PIPELINES, "")
        config = _as_pipelines(config, int(number) if number.isdecimal() else 1)
    return RunPlacement(config, told)


def _as_pipelines(config: TrainConfig, pipelines: int) -> TrainConfig:
    return replace(config, topology=replace(config.topology, placement="pipeline", pipelines=pipelines))
