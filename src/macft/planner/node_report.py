"""What the nodes of a run tell each other before its layout is chosen: how fast each is, and what it can hold."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from macft.collective.base import Collective
from macft.device.disk_speed import disk_speed
from macft.device.kind import Device
from macft.errors import ConfigError
from macft.network.link_kinds import LINK_KINDS
from macft.planner.cluster_model import CHOICES, Alone, Node, NodeLink, RingLinks
from macft.planner.fit import MemoryPlanner
from macft.planner.layout_inputs import alone, model_cost, step_work
from macft.planner.partition import LayoutDecision, choose_layout
from macft.planner.placement import Placer
from macft.planner.speed import CPU_EFFICIENCY, MAC_EFFICIENCY, measured_flops

_LONGEST_REPORT = 4096
_LONGEST_NAME = 255


def own_report(name: str, placer: Placer, processes: int = 1) -> Node:
    """This machine as a node, one of ``processes`` on it; ``placer`` has the rows that it would get.

    Measures the speed of matrix products, about 0.3 s. For the disk see :func:`~macft.device.disk_speed.disk_speed`.
    """
    efficiency = CPU_EFFICIENCY if Device.default().kind == "cpu" else MAC_EFFICIENCY
    speed, disk = measured_flops() * efficiency / processes, disk_speed().bytes_per_second / processes
    execution, refusal = placer.choice()
    ways = () if refusal is not None else (alone(placer, execution, speed=speed, disk=disk),)
    return Node(name, speed, placer.budget, disk, ways)


def gather_reports(collective: Collective, own: Node) -> list[Node]:
    """Every rank's node, by rank. A call of all ranks.

    Raises:
        ConfigError: a rank's report is not valid.
    """
    nodes = []
    for rank, payload in enumerate(collective.all_gather(to_payload(own))):
        node = from_payload(payload)
        if node is None:
            raise ConfigError(f"topology.placement: rank {rank} sent no valid report of its speed and memory")
        nodes.append(node)
    return nodes


def to_payload(node: Node) -> bytes:
    """The node as JSON."""
    ways = [[way.per_token, way.reading, way.streams] for way in node.alone]
    return json.dumps([node.name[:_LONGEST_NAME], node.speed, node.memory, node.disk, ways]).encode()


def from_payload(payload: bytes) -> Node | None:
    """The inverse of :func:`to_payload`; None if it is none."""
    if len(payload) > _LONGEST_REPORT:
        return None
    try:
        name, *sizes, ways = json.loads(payload)
        speed, memory, disk = map(float, sizes)
        alone_ways = tuple(Alone(float(each), float(reading), bool(streams)) for each, reading, streams in ways)
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None
    numbers: list[Any] = [speed, memory, disk, *(way.per_token for way in alone_ways)]
    if not all(math.isfinite(number) and number > 0 for number in numbers) or not isinstance(name, str):
        return None
    if not all(math.isfinite(way.reading) and way.reading >= 0 for way in alone_ways):
        return None
    return Node(name, speed, memory, disk, alone_ways)


def layout_for(
    nodes: Sequence[Node],
    whole: MemoryPlanner,
    *,
    wanted: str,
    micro_batch_size: int | None,
    link: NodeLink | None = None,
    kinds: Sequence[str] = CHOICES,
) -> LayoutDecision:
    """The placement of a run on ``nodes``, by rank; ``whole`` has all rows of the steps.

    ``link``: what connects the nodes; where nobody measured it, 1 Gbit/s is assumed. For the others see
    :func:`~macft.planner.partition.choose_layout`.

    Raises:
        ConfigError: nothing that is wanted fits.
    """
    if link is None:
        kind = LINK_KINDS["ethernet"]
        link = NodeLink(kind.bandwidth, kind.latency)
    ring = RingLinks.of_one_kind(link, len(nodes))
    return choose_layout(nodes, ring, model_cost(whole), step_work(whole, micro_batch_size), wanted=wanted, kinds=kinds)
