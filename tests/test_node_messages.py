"""What one node has to say is told once, with its number, wherever it is said."""

from __future__ import annotations

import numpy as np
import pytest

from helpers.cables import two_cables
from helpers.rings import run_ranks
from macft.collective.ring.ring import Ring
from macft.collective.solo import Solo
from macft.parallel.node_status import NodeStatus
from macft.training.node_messages import NodeMessages


def told_by(collective: Ring | Solo, lines: list[str], *, steps: int) -> list[list[str]]:
    """What is told after each of ``steps`` steps, in the first of which this node has ``lines`` to tell."""
    waiting = [lines]
    messages = NodeMessages(collective, lambda: waiting.pop() if waiting else [])
    told = []
    for _ in range(steps):
        slots = np.zeros((collective.world_size, NodeStatus.SIZE))
        slots[collective.rank] = NodeStatus(messages=messages.collect()).numbers()
        collective.all_reduce([slots])
        told.append(messages.exchange([NodeStatus.of_numbers(slot.tolist()) for slot in slots]))
    return told


def test_lines_of_all_nodes_are_told_once() -> None:
    lines = {
        0: ["no battery"],
        1: ["no battery", "pmset is silent"],
        2: ["no battery", "odd\nwords\x1b[31m" + "x" * 900],
    }
    with two_cables(3) as (listeners, addresses, _):
        told = run_ranks(listeners, lambda ring: told_by(ring, lines[ring.rank], steps=3), addresses=addresses)
    assert told[0] == told[1] == told[2]
    first, *later = told[0]
    assert later == [[], []]
    assert first[:2] == ["no battery", "node 1: pmset is silent"]
    assert first[2].startswith("node 2: odd words[31mxxx")
    assert len(first[2]) < 520
    assert told_by(Solo(), ["no battery"], steps=2) == [["no battery"], []]


@pytest.mark.slow
def test_a_cable_lost_at_one_node_is_told_by_all() -> None:
    with two_cables(2) as (listeners, addresses, cables):
        cables[1][1].cut()
        told = run_ranks(listeners, lambda ring: told_by(ring, [], steps=2), addresses=addresses)
    lost = f"node 0: a cable to the next node is lost ({cables[1][1].address}); the others carry on"
    assert told == [[[lost], []]] * 2
