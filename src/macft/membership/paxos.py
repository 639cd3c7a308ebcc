"""Which nodes are members: they agree on one view after another. Pure logic: no sockets, no threads, no clock.

A *view* is a generation and its members by rank. The members of view g choose view g + 1 by Paxos (Lamport, "Paxos Made
Simple", 2001): one instance for each generation, whose acceptors are the members of view g. All state is sent in one
kind of message, the heartbeat. Each one has the whole current state of its sender, so any of them may be lost.

A quorum is one of:

1. more than half of a view's members, or half of them including the lowest rank. Two of these always share a member. So
   two different views of one generation are never both chosen, whoever proposes, and however messages are lost,
   repeated, delayed or reordered.
2. all members that are not *known* to have ended. This one need not share a member with another quorum, so it is safe
   only under an assumption about time: clocks run at the same rate, and a heartbeat is processed soon after it was
   sent. :meth:`PaxosMembership.mark_ended` states the bound.

docs/elastic.md explains the consequences.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_RETRY_SECONDS = 0.5
_log = logging.getLogger("macft.membership")


class MemberRecord(NamedTuple):
    """A member, and where its membership service and its ring listen (``host:port``, several paths with ``+``)."""

    id: str
    name: str
    address: str
    key: bytes = b""
    ring: str = ""
    ring_key: bytes = b""


class View(NamedTuple):
    """The members of ``generation``, ordered by rank."""

    generation: int
    members: tuple[MemberRecord, ...]

    @property
    def ids(self) -> tuple[str, ...]:
        """The members' ids, ordered by rank."""
        return tuple(member.id for member in self.members)

    @property
    def names(self) -> tuple[str, ...]:
        """The members' names, ordered by rank."""
        return tuple(member.name for member in self.members)


class Ballot(NamedTuple):
    """The number of a proposal, unique to its proposer."""

    number: int
    proposer: str


class Vote(NamedTuple):
    """``view`` was proposed, or accepted, with ``ballot``."""

    ballot: Ballot
    view: View


@dataclass(frozen=True)
class Heartbeat:
    """The state of a node, which it sends to all others periodically.

    Attributes:
        sender: The node.
        view: The newest view it knows.
        hears: Ids of the nodes from which it has received heartbeats recently.
        ready: Whether it has left the ring of this view. It then listens at ``sender.ring`` for its next ring and waits
            for the next view.
        ballot: The ballot with which it proposes the next view.
        proposed: What it proposes as the next view.
        promised: The highest ballot it has promised to.
        accepted: What it has accepted as the next view.
        number: Counts the heartbeats of its sender, so that one that is late or was recorded is recognised.
        stops: Whether its user wants the run to stop. It plays no part in the agreement.
    """

    sender: MemberRecord
    view: View
    hears: tuple[str, ...] = ()
    ready: bool = False
    ballot: Ballot | None = None
    proposed: Vote | None = None
    promised: Ballot | None = None
    accepted: Vote | None = None
    number: int = 0
    stops: bool = False


class PaxosMembership:
    """One node's part in the agreement. All times are in seconds of one clock that never goes back.

    Args:
        own: This node.
        view: The newest view it knows. The node need not be a member of it.
        silence: Seconds without a heartbeat after which a node is lost.
        patience: Seconds that the others wait for a node that sends heartbeats but does not leave its ring.
        now: The current time.
    """

    def __init__(self, own: MemberRecord, view: View, *, silence: float, patience: float, now: float):
        self.own = own
        self._silence, self._patience = silence, patience
        self._heartbeats: dict[str, Heartbeat] = {}
        self._last_heard: dict[str, float] = {}
        self._ended: set[str] = set()
        self._sent = 0
        self.departures: dict[str, str] = {}
        """Why members of the previous view are not in this one, by id."""
        self.view = view
        self._ready = False
        self._ready_since = now
        self._ballot: Ballot | None = None
        self._proposed: Vote | None = None
        self._promised: Ballot | None = None
        self._accepted: Vote | None = None
        self._attempts = 0
        self._retry_at = 0.0
        self._start_instance(view, now)

    @property
    def is_member(self) -> bool:
        """Whether this node is in the newest view it knows."""
        return self.own.id in self.view.ids

    def receive(self, heartbeat: Heartbeat, now: float) -> None:
        """Processes another node's heartbeat."""
        sender = heartbeat.sender.id
        if sender == self.own.id:
            return
        known = self._heartbeats.get(sender)
        if known is not None and known.number >= heartbeat.number:
            return  # delayed, or repeated: it also arrives over other cables
        self._heartbeats[sender], self._last_heard[sender] = heartbeat, now
        self._ended.discard(sender)
        if heartbeat.ready:
            for member in self.view.members:
                if member.address == heartbeat.sender.address and member.id != sender:
                    self.mark_ended(member.id, now)  # a new process has its port
        if heartbeat.view.generation > self.view.generation:
            self._install(heartbeat.view, now)
        elif heartbeat.view.generation == self.view.generation and self._is_acceptor_for(sender):
            self._accept_from(heartbeat)
        self.tick(now)

    def mark_ended(self, member: str, now: float) -> None:
        """There is proof that ``member``'s process has ended. It counts only if the two were in contact until then.

        A heartbeat says that its sender has heard this node in the ``silence / 2`` before it was sent. So the sender
        cannot have declared this node lost within ``silence / 2`` after that, and no later view without this node is
        known only to processes that have ended.

        The age of that heartbeat is measured from when this node processed it. So the proof is valid if its delay and
        its age are at most ``silence / 2`` together. This is an assumption: a heartbeat that was delayed by more, for
        example because this process was stopped, can lead to a second view of a generation.
        """
        heartbeat = self._heartbeats.get(member)
        in_contact = (
            heartbeat is None or self.own.id in heartbeat.hears or heartbeat.view.generation < self.view.generation
        )
        if in_contact and now - self._last_heard.get(member, now - self._silence) <= self._silence / 2:
            self._ended.add(member)

    def set_ready(self, ring: str, ring_key: bytes, now: float) -> None:
        """This node has left the ring of its view; it listens at ``ring`` for the next one."""
        self.own = self.own._replace(ring=ring, ring_key=ring_key)
        self._ready = True
        self._ready_since = now
        self.tick(now)

    def tick(self, now: float) -> None:
        """Proposes a view, or adopts a chosen one, if the known facts and the time allow it."""
        if not self.is_member:
            return
        if self._ready:
            self._propose(now)
        for vote in self._accepted_votes():
            voters = [member for member in self.view.ids if self._acceptance(member) == vote]
            if self._is_quorum(voters):
                self._install(vote.view, now)
                return

    def heartbeat(self, now: float) -> Heartbeat:
        """This node's state, for all others."""
        self._sent += 1
        return Heartbeat(
            sender=self.own,
            view=self.view,
            hears=self._hears(now),
            ready=self._ready,
            ballot=self._ballot,
            proposed=self._proposed,
            promised=self._promised,
            accepted=self._accepted,
            number=self._sent,
        )

    def lost(self, now: float) -> dict[str, str]:
        """Members of the view that are lost, and why, by id."""
        return {member: reason for member in self.view.ids if (reason := self._loss_reason(member, now))}

    def ring_failure(self, now: float) -> str:
        """Why this view's ring can no longer be used; empty if it can."""
        for member, reason in self.lost(now).items():
            return f"{self._name(member)} is lost: {reason}"
        for member in self.view.ids:
            heartbeat = self._heartbeats.get(member)
            if heartbeat is not None and heartbeat.ready and heartbeat.view.generation == self.view.generation:
                return f"{self._name(member)} has left the ring"
        return ""

    def candidates(self, now: float) -> list[MemberRecord]:
        """Nodes that wait to join and could: they and all members that are not lost hear each other."""
        members = [member for member in self.view.ids if not self._loss_reason(member, now)]
        return self._candidates(members, now)

    def newcomers(self, now: float) -> list[MemberRecord]:
        """Nodes that are heard and not members; they must hear this node before they can join."""
        members = self.view.ids
        return [
            heartbeat.sender
            for node, heartbeat in self._heartbeats.items()
            if node not in members and not self._loss_reason(node, now)
        ]

    def waiting_for(self, now: float) -> str:
        """What this node, which is ready, waits for, in words that continue "this node waits for"."""
        lost = self.lost(now)
        if not self.is_member:
            return "the other nodes to accept it"
        if not self._is_quorum([member for member in self.view.ids if member not in lost]):
            names = ", ".join(f"{self._name(member)} ({reason})" for member, reason in lost.items())
            remaining = len(self.view.ids) - len(lost)
            return f"{names}; {remaining} of {len(self.view.ids)} nodes are too few to continue"
        late = [self._name(m) for m in self.view.ids if m != self.own.id and m not in lost and not self._is_ready(m)]
        return f"{', '.join(late)} to finish the step" if late else "the other nodes to agree on the members"

    def _install(self, view: View, now: float) -> None:
        left = [member for member in self.view.ids if member not in view.ids]
        self.departures = {member: self._loss_reason(member, now) or "it left" for member in left}
        reasons = ", ".join(f"{self._name(member)} left ({reason})" for member, reason in self.departures.items())
        joined = ", ".join(member.name for member in view.members if member.id not in self.view.ids)
        _log.info(
            "view %d adopted: %s%s%s",
            view.generation,
            ", ".join(view.names),
            f"; {reasons}" if reasons else "",
            f"; {joined} joined" if joined else "",
        )
        self._ready = self._ready and self.own.id not in view.ids  # a node that was left out keeps waiting to join
        self._start_instance(view, now)

    def _start_instance(self, view: View, now: float) -> None:
        """Starts the Paxos instance that chooses the view after ``view``."""
        self.view = view
        self._ready_since = now
        self._ballot = self._proposed = self._promised = self._accepted = None
        self._attempts, self._retry_at = 0, 0.0
        self._ended &= set(view.ids)
        for member in view.ids:  # they have just agreed, so they are alive; the silence of each starts now
            if member not in self._heartbeats or self._heartbeats[member].view.generation < view.generation:
                self._last_heard[member] = now

    def _is_acceptor_for(self, sender: str) -> bool:
        return self.is_member and sender in self.view.ids

    def _accept_from(self, heartbeat: Heartbeat) -> None:
        """The acceptor: promises to the highest ballot, accepts its proposal."""
        if heartbeat.ballot is not None and (self._promised is None or heartbeat.ballot > self._promised):
            self._promised = heartbeat.ballot
        vote = heartbeat.proposed
        if vote is not None and (self._promised is None or vote.ballot >= self._promised):
            self._promised, self._accepted = vote.ballot, vote

    def _propose(self, now: float) -> None:
        """The proposer: only the lowest rank of those that are not lost proposes."""
        members = self._choose_members(now)
        if members is None or not self._is_quorum([m for m in self.view.ids if not self._loss_reason(m, now)]):
            return
        outbid = self._ballot is not None and self._promised is not None and self._promised > self._ballot
        if self._ballot is None or now >= self._retry_at or (outbid and self._proposed is None):
            self._attempts += 1
            known = (self._promised, *(heartbeat.promised for heartbeat in self._heartbeats.values()))
            highest = max([ballot.number for ballot in known if ballot], default=0)
            self._ballot, self._proposed = Ballot(highest + 1, self.own.id), None
            self._promised = self._ballot
            self._retry_at = now + _RETRY_SECONDS * (self.view.ids.index(self.own.id) + self._attempts)
        if self._proposed is None and not outbid:
            promises = [member for member in self.view.ids if self._promise(member) == self._ballot]
            if self._is_quorum(promises):
                earlier = [vote for member in promises if (vote := self._acceptance(member)) is not None]
                view = max(earlier).view if earlier else self._next_view(members, now)
                self._proposed = self._accepted = Vote(self._ballot, view)
                _log.info(
                    "view %d proposed: %s (ballot %d)", view.generation, ", ".join(view.names), self._ballot.number
                )

    def _choose_members(self, now: float) -> list[str] | None:
        """The members that stay in the next view; None while another node should propose, or a member isn't ready."""
        alive = [member for member in self.view.ids if not self._loss_reason(member, now)]
        if alive[0] != self.own.id:
            return None
        if now - self._ready_since > self._patience:
            alive = [member for member in alive if self._is_ready(member)]
        elif not all(map(self._is_ready, alive)):
            return None
        chosen: list[str] = []
        for member in alive:
            if all(self._hear_each_other(member, other, now) for other in chosen):
                chosen.append(member)
        return chosen

    def _next_view(self, members: Sequence[str], now: float) -> View:
        records = [self.own if member == self.own.id else self._heartbeats[member].sender for member in members]
        return View(self.view.generation + 1, (*records, *self._candidates(members, now)))

    def _candidates(self, members: Collection[str], now: float) -> list[MemberRecord]:
        candidates: list[MemberRecord] = []
        for node, heartbeat in sorted(self._heartbeats.items()):
            wants_to_join = heartbeat.ready and node not in self.view.ids and node not in heartbeat.view.ids
            if (
                wants_to_join
                and not self._loss_reason(node, now)
                and all(self._hear_each_other(node, member, now) for member in members)
                and all(self._hear_each_other(node, other.id, now) for other in candidates)
                and heartbeat.sender.address not in [other.address for other in candidates]
            ):
                candidates.append(heartbeat.sender)
        return candidates

    def _hear_each_other(self, one: str, other: str, now: float) -> bool:
        return one == other or (other in self._heard_by(one, now) and one in self._heard_by(other, now))

    def _heard_by(self, member: str, now: float) -> tuple[str, ...]:
        if member == self.own.id:
            return self._hears(now)
        return self._heartbeats[member].hears if member in self._heartbeats else ()

    def _hears(self, now: float) -> tuple[str, ...]:
        return tuple(sorted(node for node, at in self._last_heard.items() if now - at <= self._silence / 2))

    def _loss_reason(self, member: str, now: float) -> str:
        """Why a member is lost; empty if it is not."""
        if member == self.own.id:
            return ""
        if member in self._ended:
            return "its process ended"
        silent = now - self._last_heard.get(member, -math.inf)
        return f"silent for {self._silence:g} s" if silent > self._silence else ""

    def _is_ready(self, member: str) -> bool:
        if member == self.own.id:
            return self._ready
        heartbeat = self._heartbeats.get(member)
        return heartbeat is not None and heartbeat.ready and heartbeat.view.generation == self.view.generation

    def _is_quorum(self, voters: Collection[str]) -> bool:
        members = self.view.ids
        if 2 * len(voters) == len(members):
            if members[0] in voters:
                return True
        elif 2 * len(voters) > len(members):
            return True
        return bool(voters) and all(member in voters or member in self._ended for member in members)

    def _promise(self, member: str) -> Ballot | None:
        heartbeat = self._state_of(member)
        return heartbeat.promised if heartbeat is not None else None

    def _acceptance(self, member: str) -> Vote | None:
        heartbeat = self._state_of(member)
        return heartbeat.accepted if heartbeat is not None else None

    def _accepted_votes(self) -> list[Vote]:
        return sorted({vote for member in self.view.ids if (vote := self._acceptance(member)) is not None})

    def _state_of(self, member: str) -> Heartbeat | None:
        """A member's state in this Paxos instance, if known."""
        if member == self.own.id:
            return Heartbeat(self.own, self.view, promised=self._promised, accepted=self._accepted)
        heartbeat = self._heartbeats.get(member)
        is_current = heartbeat is not None and heartbeat.view.generation == self.view.generation
        return heartbeat if is_current else None

    def _name(self, member: str) -> str:
        return self.view.members[self.view.ids.index(member)].name
