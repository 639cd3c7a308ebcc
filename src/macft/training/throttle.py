"""When a node works and when it rests, as the trainer sees it."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from macft.data.batch import Batch
from macft.parallel.node_status import NodeStatus


class Throttle(Protocol):
    """Asked by the trainer around everything that heats the node."""

    def paced(self, batches: Iterable[Batch]) -> Generator[Batch]:
        """The same micro-batches, each handed out when it may be computed; closed when the last one is computed."""
        ...

    def working(self) -> AbstractContextManager[None]:
        """Surrounds work other than a step's."""
        ...

    def status(self, tokens: int, seconds: float) -> NodeStatus:
        """This node's status after a step of ``tokens``, computed in ``seconds`` with the rests."""
        ...

    def remarks(self, nodes: Sequence[NodeStatus], shares: Sequence[float]) -> list[str]:
        """Lines worth telling now that all nodes' statuses are known; the same on every node."""
        ...

    def own_remarks(self) -> list[str]:
        """New lines about this node alone, each of them once."""
        ...


class NoThrottle:
    """Never rests, measures nothing but speed."""

    def paced(self, batches: Iterable[Batch]) -> Generator[Batch]:
        """Unchanged."""
        yield from batches

    def working(self) -> AbstractContextManager[None]:
        """Does nothing."""
        return nullcontext()

    def status(self, tokens: int, seconds: float) -> NodeStatus:
        """Speed alone."""
        return NodeStatus(tokens=tokens, busy_seconds=seconds)

    def remarks(self, nodes: Sequence[NodeStatus], shares: Sequence[float]) -> list[str]:  # noqa: ARG002
        """Nothing to say."""
        return []

    def own_remarks(self) -> list[str]:
        """Nothing to say."""
        return []
