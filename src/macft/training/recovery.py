"""After the members have changed: all go on from the newest state that one of them has."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgpack

from macft.collective.base import Collective
from macft.collective.elastic import ElasticCollective, MembershipView
from macft.parallel.node_status import NodeStatus
from macft.report.events import Noted, Reporter
from macft.training.stop import StopRequest

_PATIENT_SECONDS = 3.0


class Position(NamedTuple):
    """How far a node is. Nodes of one ring are at most one call apart, and of equal positions they hold equal bits.

    ``generation`` is the last one in which this node came to one state with the others: what a node has that was left
    out meanwhile is of another history, however far it is. -1 for a newcomer, which has a state of its own.
    """

    generation: int
    scored: int
    step: int
    evaluated: int
    ended: int


def sync_to_newest(
    collective: Collective, position: Position, describe: Callable[[bool], dict[str, Any]]
) -> tuple[dict[str, Any], bool]:
    """What the node that is furthest describes, on every rank, and whether this rank is behind it.

    ``describe`` is told whether any rank is behind, and so needs everything. A call of all ranks; raises as the
    collective does.
    """
    positions = [Position(*msgpack.unpackb(blob)) for blob in collective.all_gather(msgpack.packb(list(position)))]
    best = max(positions)
    source = positions.index(best)
    behind = [rank != source and (other != best or best.generation < 0) for rank, other in enumerate(positions)]
    payload = b""
    if collective.rank == source:
        payload = msgpack.packb(describe(any(behind)))
    payload = collective.broadcast(payload, source)
    return msgpack.unpackb(payload, max_bin_len=len(payload)), behind[collective.rank]


class MemberTracker:
    """Which nodes the trainer's state is about, by rank: those of the last generation it came to one state in."""

    def __init__(self, elastic: ElasticCollective):
        members = elastic.members
        self.generation = members.generation if elastic.is_member else -1
        self._names = dict(zip(members.ids, members.names, strict=True))
        self.departed: dict[str, NodeStatus] = {}
        """The last word of nodes that are gone, by id."""

    def old_ranks(self, members: MembershipView) -> list[int | None]:
        """By new rank, the old one; None for a newcomer."""
        known = list(self._names)
        return [known.index(member) if member in known else None for member in members.ids]

    def move(self, members: MembershipView, nodes: Sequence[NodeStatus]) -> tuple[dict[str, str], list[str]]:
        """Takes ``members`` for granted from now on; returns who left, with the reasons, and who joined.

        ``nodes`` are the statuses of the step before, by old rank, if there are any.
        """
        gone = {member: name for member, name in self._names.items() if member not in members.ids}
        for rank, member in enumerate(self._names):
            if member in gone and rank < len(nodes):
                self.departed[member] = nodes[rank]
        joined = [name for member, name in zip(members.ids, members.names, strict=True) if member not in self._names]
        self.generation = members.generation
        self._names = dict(zip(members.ids, members.names, strict=True))
        for member in members.ids:
            self.departed.pop(member, None)  # back again, and it counts on by itself
        return {name: members.why.get(member, "it was lost") for member, name in gone.items()}, joined


class PauseNotice:
    """Asked while a node waits for others: says so once, when it takes long, and goes on until the end is asked for."""

    def __init__(self, stop: StopRequest, reporter: Reporter):
        self._stop, self._reporter = stop, reporter
        self._started: float | None = None
        self._told = ""

    def __call__(self, whom: str) -> bool:
        """Takes whom this node waits for; returns whether to go on waiting."""
        self._started = self._started or time.monotonic()
        if time.monotonic() - self._started > _PATIENT_SECONDS and whom != self._told:
            self._told = whom
            self._reporter.handle(Noted(f"paused: this node waits for {whom}", "warning"))
        return not self._stop.requested
