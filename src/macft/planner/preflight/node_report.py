"""What the nodes of a run tell each other before its layout is chosen: how fast each is, and what it can hold."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import replace

from macft.collective.base import Collective
from macft.device.chips import own_chip
from macft.device.disk_speed import UNKNOWN_DISK, disk_speed
from macft.errors import ConfigError
from macft.network.link_kinds import LINK_KINDS
from macft.network.own_link import own_link
from macft.planner.memory_planner import MemoryPlanner
from macft.planner.placement.cluster_model import Alone, Node, NodeLink, RingLinks
from macft.planner.placement.inputs import alone
from macft.planner.speed import expected_speed, measured_speed, work_of
from macft.planner.whole_model import WholeModelPlanner

_LONGEST_REPORT = 4096
_LONGEST_NAME = 255
# The speed of a node that has not measured it, which no real one has, and the link between processes of a machine.
_UNMEASURED = 1.0
_INSIDE = NodeLink(1e10, 1e-5)
# The part of a speed that another measurement of it reaches at least.
_ALIKE = 0.85


def own_node(
    planner: MemoryPlanner, memory: float, *, name: str | None = None, processes: int = 1, address: str | None = None
) -> Node:
    """This machine as a node that may take ``memory`` bytes, one of ``processes`` on it, for steps like ``planner``'s.

    ``address``: at which the others reach it. Its name is that of the machine and of its chip unless ``name`` is given.

    For its speed see :mod:`macft.planner.speed`; where the chip is unknown it is measured, about 0.6 s. For the disk
    see :func:`~macft.device.disk_speed.disk_speed`.
    """
    execution = planner.execution
    speed = expected_speed(execution).operations_per_second
    measured = measured_speed(work_of(planner), execution)
    if name is None:
        chip = own_chip()
        name = f"{platform.node()}, {chip.chip if chip is not None else platform.machine()}"
    found = own_link(address) if address is not None else None
    return Node(
        name,
        speed / processes,
        memory,
        disk_speed().bytes_per_second / processes,
        link=None if found is None else NodeLink(found.bandwidth, found.latency),
        trained=None if measured is None else measured.speed / processes,
    )


def one_of_many_here(memory: float) -> Node:
    """One of the nodes of ``topology=local``, whose speed nobody measures before the run."""
    return Node(platform.node(), _UNMEASURED, memory, UNKNOWN_DISK, link=_INSIDE)


def own_report(
    whole_model: WholeModelPlanner, *, name: str | None = None, processes: int = 1, address: str | None = None
) -> Node:
    """That of :func:`own_node`, with how it computes alone; ``whole_model`` has the rows that it would get."""
    node = own_node(whole_model.planner, whole_model.budget, name=name, processes=processes, address=address)
    execution, refusal = whole_model.choice()
    ways = () if refusal is not None else (alone(whole_model, execution, speed=node.speed, disk=node.disk),)
    return replace(node, alone=ways)


def gather_reports(collective: Collective, own: Node | None) -> list[Node]:
    """Every rank's node, by rank; none at all if a rank has None. A collective call.

    Raises:
        ConfigError: a rank's report is not valid.
    """
    nodes = []
    payloads = collective.all_gather(b"" if own is None else to_payload(own))
    for rank, payload in enumerate(payloads if all(payloads) else []):
        node = from_payload(payload)
        if node is None:
            raise ConfigError(f"topology.placement: rank {rank} sent no valid report of its speed and memory")
        nodes.append(node)
    return nodes


def alike(nodes: Sequence[Node]) -> list[Node]:
    """``nodes`` with one speed, and one disk, for all whose figures differ by no more than measurements do.

    Nodes of one name are on one machine, where they slow down each other's measurement. Where one has not measured its
    speed, all count as equally fast. Where ``macft bench --training`` has measured all of them, that counts: beside
    the speeds that others expect of their chips it would say that equal nodes differ.
    """
    trained = [node.trained for node in nodes if node.trained is not None]
    if any(node.speed == _UNMEASURED for node in nodes):
        nodes = [_with(node, _UNMEASURED, node.disk) for node in nodes]
    elif len(trained) == len(nodes):
        nodes = [_with(node, speed, node.disk) for node, speed in zip(nodes, trained, strict=True)]
    here = {name: [node for node in nodes if node.name == name] for name in {node.name for node in nodes}}
    speeds = {name: max(node.speed for node in same) for name, same in here.items()}
    disks = {name: max(node.disk for node in same) for name, same in here.items()}
    speed_of, disk_of = _rounded(speeds.values()), _rounded(disks.values())
    return [_with(node, speed_of[speeds[node.name]], disk_of[disks[node.name]]) for node in nodes]


def _with(node: Node, speed: float, disk: float) -> Node:
    """``node`` with another speed and disk; so it computes alone in another time."""
    ways = (
        replace(way, per_token=way.per_token * node.speed / speed, reading=way.reading * node.disk / disk)
        for way in node.alone
    )
    return replace(node, speed=speed, disk=disk, alone=tuple(ways))


def _rounded(values: Iterable[float]) -> dict[float, float]:
    """For each value the largest one of its group, all of whose values are at least ``_ALIKE`` times it."""
    rounded: dict[float, float] = {}
    largest = math.inf
    for value in sorted(values, reverse=True):
        if math.isinf(largest) or value < _ALIKE * largest:
            largest = value
        rounded[value] = largest
    return rounded


def to_payload(node: Node) -> bytes:
    """The node as JSON."""
    ways = [[way.per_token, way.reading, way.streams] for way in node.alone]
    link = node.link and [node.link.bandwidth, node.link.latency]
    numbers = (node.speed, node.memory, node.disk, node.trained)
    return json.dumps([node.name[:_LONGEST_NAME], *numbers, link, ways]).encode()


def from_payload(payload: bytes) -> Node | None:
    """The inverse of :func:`to_payload`; None if it is none."""
    if len(payload) > _LONGEST_REPORT:
        return None
    try:
        name, *sizes, trained, to_others, ways = json.loads(payload)
        speed, memory, disk = map(float, sizes)
        trained = None if trained is None else float(trained)
        link = None if to_others is None else NodeLink(*map(float, to_others))
        alone_ways = tuple(Alone(float(each), float(reading), bool(streams)) for each, reading, streams in ways)
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None
    positive = [speed, memory, disk, *(way.per_token for way in alone_ways), *([link.bandwidth] if link else [])]
    positive += [] if trained is None else [trained]
    others = [*(way.reading for way in alone_ways), *([link.latency] if link else [])]
    if not all(math.isfinite(number) and number > 0 for number in positive) or not isinstance(name, str):
        return None
    if not all(math.isfinite(number) and number >= 0 for number in others):
        return None
    return Node(name, speed, memory, disk, alone_ways, link, trained)


def ring_of(nodes: Sequence[Node]) -> RingLinks:
    """The links of ``nodes`` in ring order: each is as slow as the slower end. Unknown ones are of 1 Gbit/s."""
    kind = LINK_KINDS["ethernet"]
    ends = [node.link or NodeLink(kind.bandwidth, kind.latency) for node in nodes]
    pairs = zip(ends, [*ends[1:], *ends[:1]], strict=True)
    return RingLinks(tuple(NodeLink(min(a.bandwidth, b.bandwidth), max(a.latency, b.latency)) for a, b in pairs))
