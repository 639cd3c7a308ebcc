"""Replayed events as bytes, for a node that missed the newest ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import msgpack

from macft.parallel.node_status import NodeStatus
from macft.report.events import ReplayedEvent


def pack_events(events: Iterable[ReplayedEvent]) -> bytes:
    """``events`` as msgpack."""
    packed: bytes = msgpack.packb(
        [[event.type_name, dataclasses.asdict(event)] for event in events], default=lambda number: number.item()
    )
    return packed


def unpack_events(data: bytes) -> list[ReplayedEvent]:
    """The inverse of :func:`pack_events`; no bytes are no events."""
    if not data:
        return []
    types = {kind.type_name: kind for kind in ReplayedEvent.__subclasses__()}
    return [types[name](**_restored(fields)) for name, fields in msgpack.unpackb(data)]


def _restored(fields: dict[str, Any]) -> dict[str, Any]:
    if "nodes" in fields:
        fields["nodes"] = [NodeStatus(**status) for status in fields["nodes"]]
    return fields
