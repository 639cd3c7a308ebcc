"""After nodes were lost or have joined: a new ring, and the newest state for all of its nodes."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import msgpack
import numpy as np

from macft.checkpoint.snapshot import Snapshot
from macft.collective.elastic import ElasticCollective, MembershipView
from macft.collective.matching import require_those_of
from macft.collective.newest import find_newest
from macft.device import fault_points
from macft.errors import MembershipChanged, PeerLost
from macft.parallel.balance import ShareBalancer
from macft.parallel.node_status import NodeStatus
from macft.parallel.stage_balance import StageBalancer
from macft.parallel.stage_layout import StageLayout
from macft.report.event_bytes import pack_events, unpack_events
from macft.report.events import NodesChanged, Noted, Reporter
from macft.training.checkpoint_policy import CheckpointPolicy
from macft.training.coordination import NodeCoordinator
from macft.training.state import TrainState
from macft.training.stop_request import Stopped, StopRequest

_PATIENT_SECONDS = 3.0
_PAUSE_SECONDS = 0.2

log = logging.getLogger("macft.training")


class Position(NamedTuple):
    """How far a node is. Nodes of one ring are at most one call apart, and of equal positions they hold equal bits.

    ``generation`` is the last one in which this node had the same state as the others: what a node did after it was
    left out belongs to another history, however far it is. -1 for a newcomer, which has a state of its own.
    """

    generation: int
    scored: int
    step: int
    evaluated: int
    ended: int


class MemberTracker:
    """Which nodes the trainer's state is about, by rank: the members of the last generation in which it was shared."""

    def __init__(self, elastic: ElasticCollective):
        members = elastic.members
        self.generation = members.generation if elastic.is_member else -1
        self._names = dict(zip(members.ids, members.names, strict=True))
        self.departed: dict[str, NodeStatus] = {}
        """The last status of nodes that are gone, by id."""

    def old_ranks(self, members: MembershipView) -> list[int | None]:
        """By new rank, the old one; None for a newcomer."""
        known = list(self._names)
        return [known.index(member) if member in known else None for member in members.ids]

    def advance(self, members: MembershipView, statuses: Sequence[NodeStatus]) -> tuple[dict[str, str], list[str]]:
        """Takes over ``members``; returns the names of those who left, with the reasons, and of those who joined.

        ``statuses`` are those of the step before, by old rank, if there are any.
        """
        gone = {member: name for member, name in self._names.items() if member not in members.ids}
        for rank, member in enumerate(self._names):
            if member in gone and rank < len(statuses):
                self.departed[member] = statuses[rank]
        joined = [name for member, name in zip(members.ids, members.names, strict=True) if member not in self._names]
        self.generation = members.generation
        self._names = dict(zip(members.ids, members.names, strict=True))
        for member in members.ids:
            self.departed.pop(member, None)  # it is back and reports its own status again
        return {name: members.why.get(member, "it was lost") for member, name in gone.items()}, joined


class PauseNotice:
    """Called while a node waits for others: warns once when it takes long.

    It waits on until ``may_leave()``: a stop is requested, say. Others that come soon are waited for even then, so that
    all stop together.
    """

    def __init__(self, may_leave: Callable[[], bool], reporter: Reporter):
        self._may_leave, self._reporter = may_leave, reporter
        self._started: float | None = None
        self._announced = ""

    def __call__(self, whom: str) -> bool:
        """Takes whom this node waits for; returns whether to go on waiting."""
        self._started = self._started or time.monotonic()
        is_long = time.monotonic() - self._started > _PATIENT_SECONDS
        if is_long and whom != self._announced:
            self._announced = whom
            self._reporter.handle(Noted(f"paused: this node waits for {whom}", "warning"))
        return not (is_long and self._may_leave())


class Recovery:
    """Brings the nodes of an elastic run together again after their number has changed."""

    def __init__(
        self,
        elastic: ElasticCollective,
        state: TrainState,
        nodes: NodeCoordinator,
        checkpoints: CheckpointPolicy,
        reporter: Reporter,
        stop: StopRequest,
    ):
        self.elastic = elastic
        self._state, self._nodes, self._checkpoints = state, nodes, checkpoints
        self._reporter, self._stop = reporter, stop
        self._tracker = MemberTracker(elastic)

    @property
    def generation(self) -> int:
        """The generation of the ring in which the state was shared last."""
        return self._tracker.generation

    @property
    def departed(self) -> list[NodeStatus]:
        """The last statuses of nodes that are gone."""
        return list(self._tracker.departed.values())

    def regroup(self) -> bool:
        """Forms a new ring with the nodes that there are, and takes over the newest state among them.

        The step that was interrupted is computed again. Returns False if this node has waited for others and a stop
        was requested, or it knows that the results are on disk.

        Raises:
            CollectiveError: the nodes can't come together, or all others have ended.
        """
        started = time.monotonic()
        pause = PauseNotice(lambda: self._stop.requested or self._state.is_kept, self._reporter)
        while self._join_ring(pause):
            try:
                change = self._sync_to_newest(self.elastic.members)
            except MembershipChanged as error:
                log.info("the members changed again: %s", error)
                continue
            self._reporter.lead(is_main=self.elastic.rank == 0, step=self._state.progress.step)
            self._reporter.handle(replace(change, seconds=time.monotonic() - started))
            gc.collect()  # the ring and the stages that were left have cycles, and their buffers are large
            return True
        return False

    def wait_for_memory(self) -> None:
        """Returns at once if the members' memories hold the run. Otherwise the run pauses, with its state saved.

        A collective call.

        Raises:
            MembershipChanged: a node wants to join, or one is lost; what the members lack may have changed.
            Stopped: on all ranks alike.
        """
        lacking = self._nodes.lacking
        if not lacking:
            return
        if self._state.progress.step:
            self._checkpoints.save()
            self._checkpoints.report(wait=True)
        self._reporter.handle(
            Noted(
                f"paused: the nodes that are left can't hold the run. {'. '.join(lacking)}. It goes on when another "
                "node joins (topology.join); Ctrl-C ends it, and +resume continues it later",
                "warning",
            )
        )
        while True:
            self.elastic.check()
            wishes = np.array([self._stop.requested, self.elastic.wants_change], dtype=np.float64)
            self.elastic.all_reduce([wishes])
            if wishes[0]:
                raise Stopped
            if wishes[1]:
                raise MembershipChanged("a node wants to join")
            time.sleep(_PAUSE_SECONDS)

    def _join_ring(self, pause: PauseNotice) -> bool:
        try:
            return self.elastic.regroup(pause)
        except PeerLost:  # the others went on and have ended, and they have reported the run
            self._reporter.lead(is_main=False, step=self._state.progress.step)
            raise

    def _sync_to_newest(self, members: MembershipView) -> NodesChanged:
        state, position = self._state, self._position()
        newest = find_newest(self.elastic, position)
        require_those_of(self.elastic, newest.source, self.elastic.contents)
        self._nodes.places.tell()
        fault_points.reach("regroup")
        is_behind = [
            rank != newest.source and (other != newest.position or newest.position[0] < 0)
            for rank, other in enumerate(newest.positions)
        ]
        log.info("rank %d has the newest state, %s; this rank is at %s", newest.source, newest.position, position)
        positions = [Position(*other) for other in newest.positions]
        ahead = positions[newest.source]
        first_step = min(other.step for other in positions if other.generation == ahead.generation)
        payload = newest.share(lambda: self._describe(members, with_state=any(is_behind), first_step=first_step))
        shared = msgpack.unpackb(payload, max_bin_len=len(payload))
        if is_behind[self.elastic.rank]:
            state.restore(Snapshot.unpack(shared["state"]))
            if position.generation == ahead.generation:
                self._reporter.catch_up(unpack_events(shared["events"]))
        state.ended, state.has_final_adapter = shared["ended"], shared["has_final_adapter"]
        state.reducer.start_anew(shared["codec"], is_open=shared["codec_is_open"])
        left, joined = self._tracker.advance(members, self._nodes.statuses)
        layout = StageLayout.from_data(shared["layout"])
        stages = shared["stages"]
        self._nodes.regrouped(
            ShareBalancer.from_state_dict(shared["balance"], shared["old_ranks"]),
            layout,
            None if stages is None else StageBalancer.from_state_dict(stages, len(members.ids)),
        )
        self._checkpoints.members_changed()
        return NodesChanged(
            step=state.progress.step,
            generation=members.generation,
            names=list(members.names),
            left=left,
            joined=joined,
            shares=list(self._nodes.balancer.shares),
            recomputed=state.begun_step == state.progress.step,
            layout=layout.described(len(members.ids)) if layout.has_stages else "",
        )

    def _position(self) -> Position:
        progress = self._state.progress
        return Position(
            generation=self._tracker.generation,
            scored=bool(progress.before),
            step=progress.step,
            evaluated=-1 if progress.evaluated_step is None else progress.evaluated_step,
            ended=bool(self._state.ended) + self._state.has_final_adapter,
        )

    def _describe(self, members: MembershipView, *, with_state: bool, first_step: int) -> bytes:
        """What all nodes must have alike, as msgpack; ``with_state``: some node needs the whole state.

        ``first_step``: of which update on some node may lack events.
        """
        codec, is_open = self._state.reducer.agreed()
        values = {
            "state": self._state.capture().pack() if with_state else b"",
            "events": pack_events(self._reporter.recent(first_step)) if with_state else b"",
            "ended": self._state.ended,
            "has_final_adapter": self._state.has_final_adapter,
            "balance": self._nodes.balancer.state_dict(),
            "stages": None if self._nodes.stages is None else self._nodes.stages.state_dict(),
            "old_ranks": self._tracker.old_ranks(members),
            "layout": self._nodes.places.decide(len(members.ids)).to_data(),
            "codec": codec,
            "codec_is_open": is_open,
        }
        packed: bytes = msgpack.packb(values)
        return packed
