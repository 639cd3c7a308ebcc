"""The members' agreement on a simulated network with loss, delay, partitions, pauses and kills: never two sides."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from macft.membership.paxos import Heartbeat, MemberRecord, PaxosMembership, View

SILENCE, PATIENCE, INTERVAL = 2.0, 30.0, 0.25


@dataclass
class Node:
    """A process: its agreement, and a main thread that leaves its ring some time after the ring has broken."""

    agreement: PaxosMembership
    alive: bool = True
    paused: bool = False
    leaves_at: float | None = None
    installed: list[View] = field(default_factory=list)


class World:
    """Nodes on a network whose every delay and loss comes from one seed."""

    def __init__(self, count: int, seed: int, *, loss: float = 0.0):
        self.random = random.Random(seed)
        self.now, self.loss = 0.0, loss
        self.nodes: dict[str, Node] = {}
        self.blocked: set[tuple[str, str]] = set()
        self.chosen: dict[int, View] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self.view = View(0, tuple(_member(f"n{rank}") for rank in range(count)))
        for member in self.view.members:
            self._add(member, self.view)

    def _add(self, member: MemberRecord, view: View) -> Node:
        agreement = PaxosMembership(member, view, silence=SILENCE, patience=PATIENCE, now=self.now)
        node = self.nodes[member.id] = Node(agreement, installed=[view])
        self._at(self.random.uniform(0, INTERVAL), lambda: self._tick(member.id))
        return node

    def join(self, name: str) -> None:
        """A new process wants to take part; it has been told the newest view of a node that lives."""
        newest = max((node.agreement.view for node in self.nodes.values() if node.alive), key=lambda v: v.generation)
        self._add(_member(name), newest).agreement.set_ready(f"{name}:ring", b"", self.now)

    def kill(self, name: str) -> None:
        """The process ends; whoever can reach its machine is told so at once."""
        self.nodes[name].alive = False
        for other in self.nodes:
            if (name, other) not in self.blocked and (other, name) not in self.blocked:
                self._at(self.random.uniform(0.0, 0.1), lambda other=other: self._tell_ended(other, name))

    def split(self, side: set[str]) -> None:
        """No message passes between ``side`` and the rest."""
        self.blocked = {(a, b) for a in self.nodes for b in self.nodes if (a in side) != (b in side)}

    def run(self, seconds: float) -> None:
        """Lets time pass."""
        end = self.now + seconds
        while self._events and self._events[0][0] <= end:
            self.now, _, action = heapq.heappop(self._events)
            action()
            self._check()
        self.now = end

    def working(self) -> list[View]:
        """Views whose ring can work: all members live, run, have this view, and have not left its ring."""
        found = {node.agreement.view for node in self.nodes.values() if node.alive and node.agreement.is_member}
        return [view for view in found if all(self._works(member, view) for member in view.ids)]

    def _works(self, member: str, view: View) -> bool:
        node = self.nodes[member]
        return node.alive and node.agreement.view == view and not node.agreement.heartbeat(self.now).ready

    def _at(self, delay: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + delay, next(self._count), action))

    def _tell_ended(self, other: str, name: str) -> None:
        if self.nodes[other].alive:
            self.nodes[other].agreement.mark_ended(name, self.now)

    def _tick(self, name: str) -> None:
        node = self.nodes[name]
        if not node.alive:
            return
        if not node.paused:
            node.agreement.tick(self.now)
            self._main_thread(name, node)
            self._send(name)
        self._at(INTERVAL, lambda: self._tick(name))

    def _main_thread(self, name: str, node: Node) -> None:
        agreement = node.agreement
        if agreement.heartbeat(self.now).ready:
            return
        broken = not agreement.is_member or agreement.ring_failure(self.now) or agreement.candidates(self.now)
        if broken and node.leaves_at is None:
            node.leaves_at = self.now + self.random.uniform(0, 1.5)
        if node.leaves_at is not None and self.now >= node.leaves_at:
            node.leaves_at = None
            agreement.set_ready(f"{name}:{agreement.view.generation}", b"", self.now)

    def _send(self, name: str) -> None:
        heartbeat = self.nodes[name].agreement.heartbeat(self.now)
        for other in self.nodes:
            if other != name and (name, other) not in self.blocked:
                for _ in range(1 + (self.random.random() < self.loss)):  # some come twice
                    if self.random.random() >= self.loss:
                        self._at(self.random.expovariate(20), lambda other=other: self._deliver(other, heartbeat))

    def _deliver(self, name: str, heartbeat: Heartbeat) -> None:
        node = self.nodes[name]
        if not node.alive:
            return
        if node.paused:  # its machine keeps it for later
            self._at(INTERVAL, lambda: self._deliver(name, heartbeat))
            return
        before = node.agreement.heartbeat(self.now)
        node.agreement.receive(heartbeat, self.now)
        after = node.agreement.heartbeat(self.now)
        if (before.view, before.promised, before.accepted, before.proposed, before.ready) != (
            after.view,
            after.promised,
            after.accepted,
            after.proposed,
            after.ready,
        ):
            self._send(name)

    def _check(self) -> None:
        working = self.working()
        assert len(working) <= 1, working
        for node in self.nodes.values():
            view = node.agreement.view
            if node.alive and view != node.installed[-1]:
                assert view.generation > node.installed[-1].generation
                node.installed.append(view)


def _member(name: str) -> MemberRecord:
    return MemberRecord(name, name, f"{name}:1")


def settle(world: World, *, within: float = 60.0) -> View:
    """The view in the end: it works and holds all that live."""
    alive = {name for name, node in world.nodes.items() if node.alive}
    end = world.now + within
    while world.now < end:
        world.run(0.5)
        for view in world.working():
            if set(view.ids) == alive and not any(world.nodes[m].agreement.ring_failure(world.now) for m in alive):
                return view
    agreements = {name: world.nodes[name].agreement for name in alive}
    raise AssertionError({name: (one.view.ids, one.waiting_for(world.now)) for name, one in agreements.items()})


def test_a_killed_node_is_left_out_at_once_and_the_others_go_on() -> None:
    for victim in ("n0", "n1", "n3"):
        world = World(4, seed=1)
        world.run(3)
        world.kill(victim)
        began = world.now
        view = settle(world)
        assert set(view.ids) == {"n0", "n1", "n2", "n3"} - {victim}
        assert world.now - began < 3.0
        survivor = world.nodes[view.ids[0]].agreement
        assert survivor.departures == {victim: "its process ended"}


def test_down_to_one_whoever_dies() -> None:
    for order in itertools.permutations(("n0", "n1", "n2")):
        world = World(3, seed=2)
        world.run(2)
        for victim in order[:2]:
            world.kill(victim)
            settle(world)
        assert settle(world).ids == (order[2],)


def test_the_side_without_a_quorum_waits_and_comes_back() -> None:
    world = World(5, seed=3)
    world.run(2)
    world.split({"n0", "n1"})
    world.run(20)
    assert [view.ids for view in world.working()] == [("n2", "n3", "n4")]
    assert "2 of 5 nodes are too few to continue" in world.nodes["n0"].agreement.waiting_for(world.now)
    world.blocked.clear()
    view = settle(world)
    assert view.ids[:3] == ("n2", "n3", "n4")
    assert set(view.ids[3:]) == {"n0", "n1"}


def test_of_two_that_lose_sight_of_each_other_the_lower_rank_goes_on() -> None:
    world = World(2, seed=4)
    world.run(2)
    world.split({"n0"})
    world.run(20)
    assert [view.ids for view in world.working()] == [("n0",)]
    world.blocked.clear()
    assert settle(world).ids == ("n0", "n1")


def test_news_of_a_death_is_no_reason_to_go_on_after_a_silence() -> None:
    """n1 lost sight of n0, which went on alone with a newcomer and died; n1 must not begin a second history."""
    world = World(2, seed=5)
    world.run(2)
    world.split({"n1"})
    world.run(10)
    world.join("n2")
    world.blocked = {(a, b) for a in world.nodes for b in world.nodes if "n1" in (a, b)}
    world.run(10)
    assert world.nodes["n2"].agreement.view.ids == ("n0", "n2")
    world.kill("n0")
    world.nodes["n1"].agreement.mark_ended("n0", world.now)
    world.run(20)
    assert [view.ids for view in world.working()] == [("n2",)]


def test_a_paused_leader_comes_back_as_the_last() -> None:
    world = World(3, seed=6)
    world.run(2)
    world.nodes["n0"].paused = True
    world.run(10)
    assert [view.ids for view in world.working()] == [("n1", "n2")]
    world.nodes["n0"].paused = False
    assert settle(world).ids == ("n1", "n2", "n0")


def test_a_pair_that_can_t_hear_each_other_is_parted() -> None:
    world = World(3, seed=7)
    world.run(2)
    world.blocked = {("n1", "n2"), ("n2", "n1")}
    world.run(15)
    assert [view.ids for view in world.working()] == [("n0", "n1")]
    world.blocked.clear()
    assert settle(world).ids == ("n0", "n1", "n2")


faults = st.lists(
    st.tuples(
        st.sampled_from(["kill", "pause", "resume", "split", "heal", "join", "cut"]),
        st.integers(0, 7),
        st.integers(0, 127),
        st.floats(0.05, 6.0),
    ),
    max_size=12,
)


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(count=st.integers(1, 5), seed=st.integers(0, 1 << 30), loss=st.sampled_from([0.0, 0.1, 0.3]), plan=faults)
def test_never_two_sides_and_never_stuck(
    count: int, seed: int, loss: float, plan: list[tuple[str, int, int, float]]
) -> None:
    """``World._check`` runs at every event; in the end, healed, whoever can go on does."""
    world = World(count, seed, loss=loss)
    joined = 0
    for what, which, mask, seconds in plan:
        names = sorted(world.nodes)
        name = names[which % len(names)]
        if what == "kill" and sum(node.alive for node in world.nodes.values()) > 1:
            world.kill(name)
        elif what in ("pause", "resume"):
            world.nodes[name].paused = what == "pause"
        elif what == "split":
            world.split({names[i] for i in range(len(names)) if mask >> i & 1})
        elif what == "cut":
            other = names[mask % len(names)]
            world.blocked |= {(name, other), (other, name)}
        elif what == "heal":
            world.blocked.clear()
        elif what == "join" and joined < 3:
            joined += 1
            world.join(f"j{joined}")
        world.run(seconds)
    world.blocked.clear()
    world.loss = 0.0
    for node in world.nodes.values():
        node.paused = False
    # A majority of the newest view that lives must carry on and take all others in.
    newest = max((node.agreement.view for node in world.nodes.values()), key=lambda view: view.generation)
    living = [member for member in newest.ids if world.nodes[member].alive]
    if 2 * len(living) > len(newest.ids):
        settle(world)
    else:
        world.run(30)
