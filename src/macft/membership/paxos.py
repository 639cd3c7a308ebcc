"""Who is in the run: the members agree on one view after another. Pure logic: no sockets, no threads, no clock.

A *view* is a generation and its members by rank. The members of view g choose view g + 1 by Paxos (Lamport, "Paxos Made
Simple", 2001): one instance for each generation, whose acceptors are the members of view g. So two different views of
the same generation can't both be chosen, whoever proposes, however messages are lost, repeated, delayed or reordered.
All state travels in one kind of message, the beat: each is a set of facts that stay true, so any of them may be missed.

A quorum is more than half of a view's members, or half of them with the lowest rank among them, or all that are not
*known* to have ended. docs/elastic.md says what follows from that.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_RETRY_SECONDS = 0.5


class MemberRecord(NamedTuple):
    """A member, and where its membership service and its ring listen (``host:port``, several paths with ``+``)."""

    id: str
    name: str
    address: str
    key: bytes = b""
    ring: str = ""
    ring_key: bytes = b""


class View(NamedTuple):
    """The members of ``generation``; a member's place is its rank."""

    generation: int
    seats: tuple[MemberRecord, ...]

    @property
    def ids(self) -> tuple[str, ...]:
        """The members' ids by rank."""
        return tuple(seat.id for seat in self.seats)


class Ballot(NamedTuple):
    """Numbers a proposal; no two proposers share one."""

    number: int
    proposer: str


class Vote(NamedTuple):
    """``view`` was proposed, or accepted, under ``ballot``."""

    ballot: Ballot
    view: View


@dataclass(frozen=True)
class Heartbeat:
    """What a node tells all others, again and again.

    ``view`` is the newest it knows, ``hears`` whom it has heard lately. ``ready``: it has left the ring of this view,
    its next ring listens at ``sender.ring``, and it waits for the next view. The rest is about the view after this one:
    the ballot it proposes, what it proposes there, the ballot it has promised to, and what it has accepted.
    """

    sender: MemberRecord
    view: View
    hears: tuple[str, ...] = ()
    ready: bool = False
    ballot: Ballot | None = None
    proposed: Vote | None = None
    promised: Ballot | None = None
    accepted: Vote | None = None


class PaxosMembership:
    """One node's part. All times in seconds of one clock that never goes back.

    Args:
        own: This node. view: The newest view it knows; it need not be a member of it.
        silence: After so long without a beat a node is taken for lost. patience: So long the others wait for one that
        beats but does not leave its ring.
    """

    def __init__(self, own: MemberRecord, view: View, *, silence: float, patience: float, now: float):
        self.own = own
        self._silence, self._patience = silence, patience
        self._beats: dict[str, Heartbeat] = {}
        self._heard: dict[str, float] = {}
        self._ended: set[str] = set()
        self.why: dict[str, str] = {}
        """Why members of the view before are no longer in this one, by id."""
        self.view = view
        self._ready = False
        self._begin(view, now)

    @property
    def is_member(self) -> bool:
        """Whether this node is in the newest view it knows."""
        return self.own.id in self.view.ids

    def take(self, beat: Heartbeat, now: float) -> None:
        """Takes note of another node's beat."""
        sender = beat.sender.id
        if sender == self.own.id:
            return
        known = self._beats.get(sender)
        if known is not None and known.view.generation > beat.view.generation:
            return  # late
        self._beats[sender], self._heard[sender] = beat, now
        self._ended.discard(sender)
        for seat in self.view.seats if beat.ready else ():
            if seat.address == beat.sender.address and seat.id != sender:
                self.ended(seat.id, now)  # its place is taken by a new process
        if beat.view.generation > self.view.generation:
            self._install(beat.view, now)
        elif beat.view.generation == self.view.generation and self._votes_with(sender):
            self._follow(beat)
        self.tick(now)

    def ended(self, member: str, now: float) -> None:
        """There is proof that ``member``'s process is gone. It counts only from one that was in touch till the end.

        If this node heard it less than half of ``silence`` ago, and it heard this node then, it can't have taken this
        node for lost in between: there is no later view without this node that only the dead knew of.
        """
        beat = self._beats.get(member)
        in_touch = beat is None or self.own.id in beat.hears or beat.view.generation < self.view.generation
        if in_touch and now - self._heard.get(member, now - self._silence) <= self._silence / 2:
            self._ended.add(member)

    def ready(self, ring: str, ring_key: bytes, now: float) -> None:
        """This node has left the ring of its view; its next one listens at ``ring``."""
        self.own = self.own._replace(ring=ring, ring_key=ring_key)
        self._ready = True
        self._ready_since = now
        self.tick(now)

    def tick(self, now: float) -> None:
        """Draws the conclusions from all that is known, and from the time."""
        if not self.is_member:
            return
        if self._ready:
            self._propose(now)
        for vote in self._accepted_votes():
            voters = [member for member in self.view.ids if self._acceptance(member) == vote]
            if self._is_quorum(voters):
                self._install(vote.view, now)
                return

    def beat(self, now: float) -> Heartbeat:
        """What is to be told to all others."""
        return Heartbeat(
            sender=self.own,
            view=self.view,
            hears=self._hears(now),
            ready=self._ready,
            ballot=self._ballot,
            proposed=self._proposed,
            promised=self._promised,
            accepted=self._accepted,
        )

    def lost(self, now: float) -> dict[str, str]:
        """Members of the view that are taken for lost, and why."""
        return {member: why for member in self.view.ids if (why := self._loss(member, now))}

    def disturbed(self, now: float) -> str:
        """Why this view's ring can't be used any more, if so."""
        for member, why in self.lost(now).items():
            return f"{self._name(member)} is lost: {why}"
        for member in self.view.ids:
            beat = self._beats.get(member)
            if beat is not None and beat.ready and beat.view.generation == self.view.generation:
                return f"{self._name(member)} has left the ring"
        return ""

    def candidates(self, now: float) -> list[MemberRecord]:
        """Nodes that want to join and could: they and all members that are not lost hear each other."""
        members = [member for member in self.view.ids if not self._loss(member, now)]
        return self._candidates(members, now)

    def newcomers(self, now: float) -> list[MemberRecord]:
        """Nodes that are heard and no members; they have to hear this one before they can be let in."""
        members = self.view.ids
        return [beat.sender for name, beat in self._beats.items() if name not in members and not self._loss(name, now)]

    def waits_for(self, now: float) -> str:
        """Whom this node, which is ready, waits for, in words."""
        lost = self.lost(now)
        if not self.is_member:
            return "the others to let it in"
        if not self._is_quorum([member for member in self.view.ids if member not in lost]):
            names = ", ".join(f"{self._name(member)} ({why})" for member, why in lost.items())
            have = len(self.view.ids) - len(lost)
            return f"{names}: {have} of {len(self.view.ids)} nodes can't go on alone"
        late = [self._name(m) for m in self.view.ids if m != self.own.id and m not in lost and not self._is_ready(m)]
        return f"{', '.join(late)} to finish a step" if late else "the others to agree"

    def _install(self, view: View, now: float) -> None:
        gone = [member for member in self.view.ids if member not in view.ids]
        self.why = {member: self._loss(member, now) or "it left" for member in gone}
        self._ready = self._ready and self.own.id not in view.ids  # one that was left out waits on, to be let in again
        self._begin(view, now)

    def _begin(self, view: View, now: float) -> None:
        self.view = view
        self._ready_since = now
        self._ballot: Ballot | None = None
        self._proposed: Vote | None = None
        self._promised: Ballot | None = None
        self._accepted: Vote | None = None
        self._retry_at = 0.0
        self._tries = 0
        self._ended &= set(view.ids)
        for member in view.ids:  # they have just agreed, so they live; those who have not told yet get their time
            if member not in self._beats or self._beats[member].view.generation < view.generation:
                self._heard[member] = now

    def _votes_with(self, sender: str) -> bool:
        return self.is_member and sender in self.view.ids

    def _follow(self, beat: Heartbeat) -> None:
        """An acceptor's part."""
        if beat.ballot is not None and (self._promised is None or beat.ballot > self._promised):
            self._promised = beat.ballot
        vote = beat.proposed
        if vote is not None and (self._promised is None or vote.ballot >= self._promised):
            self._promised, self._accepted = vote.ballot, vote

    def _propose(self, now: float) -> None:
        """A proposer's part: only the lowest rank among those that are not lost proposes."""
        members = self._choose(now)
        if members is None or not self._is_quorum([m for m in self.view.ids if not self._loss(m, now)]):
            return
        outbid = self._ballot is not None and self._promised is not None and self._promised > self._ballot
        if self._ballot is None or now >= self._retry_at or (outbid and self._proposed is None):
            self._tries += 1
            highest = max(
                [b.number for b in (self._promised, *(beat.promised for beat in self._beats.values())) if b], default=0
            )
            self._ballot, self._proposed = Ballot(highest + 1, self.own.id), None
            self._promised = self._ballot
            self._retry_at = now + _RETRY_SECONDS * (self.view.ids.index(self.own.id) + self._tries)
        if self._proposed is None and not outbid:
            promises = [member for member in self.view.ids if self._promise(member) == self._ballot]
            if self._is_quorum(promises):
                earlier = [vote for member in promises if (vote := self._acceptance(member)) is not None]
                view = max(earlier).view if earlier else self._next_view(members, now)
                self._proposed = self._accepted = Vote(self._ballot, view)

    def _choose(self, now: float) -> list[str] | None:
        """Members of the next view out of this one; None while another one should propose, or a member isn't ready."""
        alive = [member for member in self.view.ids if not self._loss(member, now)]
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
        seats = [self.own if member == self.own.id else self._beats[member].sender for member in members]
        return View(self.view.generation + 1, (*seats, *self._candidates(members, now)))

    def _candidates(self, members: Collection[str], now: float) -> list[MemberRecord]:
        found: list[MemberRecord] = []
        for name, beat in sorted(self._beats.items()):
            wants = beat.ready and name not in self.view.ids and name not in beat.view.ids
            if (
                wants
                and not self._loss(name, now)
                and all(self._hear_each_other(name, member, now) for member in members)
                and all(self._hear_each_other(name, seat.id, now) for seat in found)
                and beat.sender.address not in [seat.address for seat in found]
            ):
                found.append(beat.sender)
        return found

    def _hear_each_other(self, one: str, other: str, now: float) -> bool:
        return one == other or (other in self._hears_of(one, now) and one in self._hears_of(other, now))

    def _hears_of(self, member: str, now: float) -> tuple[str, ...]:
        if member == self.own.id:
            return self._hears(now)
        return self._beats[member].hears if member in self._beats else ()

    def _hears(self, now: float) -> tuple[str, ...]:
        return tuple(sorted(name for name, at in self._heard.items() if now - at <= self._silence / 2))

    def _loss(self, member: str, now: float) -> str:
        if member == self.own.id:
            return ""
        if member in self._ended:
            return "its process ended"
        return f"silent for {self._silence:g} s" if now - self._heard.get(member, -1e9) > self._silence else ""

    def _is_ready(self, member: str) -> bool:
        if member == self.own.id:
            return self._ready
        beat = self._beats.get(member)
        return beat is not None and beat.ready and beat.view.generation == self.view.generation

    def _is_quorum(self, voters: Collection[str]) -> bool:
        members = self.view.ids
        if 2 * len(voters) == len(members):
            if members[0] in voters:
                return True
        elif 2 * len(voters) > len(members):
            return True
        return bool(voters) and all(member in voters or member in self._ended for member in members)

    def _promise(self, member: str) -> Ballot | None:
        beat = self._told(member)
        return beat.promised if beat is not None else None

    def _acceptance(self, member: str) -> Vote | None:
        beat = self._told(member)
        return beat.accepted if beat is not None else None

    def _accepted_votes(self) -> list[Vote]:
        return sorted({vote for member in self.view.ids if (vote := self._acceptance(member)) is not None})

    def _told(self, member: str) -> Heartbeat | None:
        """What a member has said about the next view."""
        if member == self.own.id:
            return Heartbeat(self.own, self.view, promised=self._promised, accepted=self._accepted)
        beat = self._beats.get(member)
        return beat if beat is not None and beat.view.generation == self.view.generation else None

    def _name(self, member: str) -> str:
        return self.view.seats[self.view.ids.index(member)].name
