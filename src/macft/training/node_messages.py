"""Messages of single nodes, such as a missing sensor or a lost cable, shown once by rank 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from macft.collective.base import Collective
from macft.parallel.node_status import NodeStatus

_MOST_LINES, _LONGEST = 20, 500


class NodeMessages:
    """Lines of all nodes, exchanged only when there are any.

    The number of a node's lines travels with its :class:`NodeStatus` in the all-reduce of every step. So all nodes know
    when to exchange lines, and a step without any costs nothing.

    Args:
        own_messages: Returns this node's new lines, each of them once.
    """

    def __init__(self, collective: Collective, own_messages: Callable[[], Sequence[str]]):
        self._collective, self._own_messages = collective, own_messages
        self._waiting: list[str] = []
        self._lost: set[str] = set()

    def collect(self) -> int:
        """Looks for new lines; returns how many of this node's lines wait to be exchanged."""
        self._waiting += self._own_messages()
        for path in self._collective.lost_paths:
            if path not in self._lost:
                self._lost.add(path)
                self._waiting.append(f"a cable to the next node is lost ({path}); the others carry on")
        del self._waiting[_MOST_LINES:]
        return len(self._waiting)

    def exchange(self, nodes: Sequence[NodeStatus]) -> list[str]:
        """All nodes' lines, with the ranks they come from. A collective call, with equal ``nodes``."""
        if not any(node.messages for node in nodes):
            return []
        own = "\n".join(" ".join(line.split())[:_LONGEST] for line in self._waiting)
        self._waiting.clear()
        senders: dict[str, list[int]] = {}
        for rank, payload in enumerate(self._collective.all_gather(own.encode())):
            for line in payload.decode(errors="replace").splitlines()[:_MOST_LINES]:
                senders.setdefault("".join(filter(str.isprintable, line))[:_LONGEST], []).append(rank)
        return [_attributed(line, ranks, self._collective.world_size) for line, ranks in senders.items()]


def _attributed(line: str, ranks: Sequence[int], count: int) -> str:
    if len(ranks) == count:
        return line
    who = f"node {ranks[0]}" if len(ranks) == 1 else f"nodes {', '.join(map(str, ranks))}"
    return f"{who}: {line}"
