"""Events of a step as bytes, for a rank that takes over the state after a step that it did not make."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import msgpack

from macft.parallel.node_status import NodeStatus
from macft.report.events import BlocksMoved, Evaluated, MetricScored, ReplayedEvent, StepDone

_KINDS: dict[str, type[ReplayedEvent]] = {
    kind.type_name: kind for kind in (StepDone, BlocksMoved, Evaluated, MetricScored)
}


def pack_events(events: Sequence[ReplayedEvent]) -> bytes:
    """The events of a step among ``events``, as msgpack; each rank makes the others itself."""
    packed: bytes = msgpack.packb(
        [[event.type_name, dataclasses.asdict(event)] for event in events if event.type_name in _KINDS]
    )
    return packed


def unpack_events(payload: bytes) -> list[ReplayedEvent]:
    """The inverse of :func:`pack_events`."""
    events = []
    for name, values in msgpack.unpackb(payload):
        if "nodes" in values:
            values["nodes"] = [NodeStatus(**status) for status in values["nodes"]]
        events.append(_KINDS[name](**values))
    return events
