"""When a node computes and when it rests, as the trainer sees it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from macft.parallel.node_status import NodeStatus


class Throttle(Protocol):
    """Called by the trainer around everything that heats the node."""

    def begin_step(self, micro_batches: int) -> None:
        """Announces a step of this many micro-batches; the step before may still be computing."""
        ...

    def before_micro_batch(self) -> None:
        """Returns when the next micro-batch may be computed; all before it are."""
        ...

    def step_computed(self) -> None:
        """The last micro-batch of the step is computed."""
        ...

    def working(self) -> AbstractContextManager[None]:
        """Surrounds work that is not part of a step, such as validation."""
        ...

    def waiting(self) -> AbstractContextManager[None]:
        """Surrounds a wait for another stage within a micro-batch: the node rests meanwhile."""
        ...

    def status(self, tokens: int, seconds: float) -> NodeStatus:
        """This node's status after a step of ``tokens`` that took ``seconds``, rests included."""
        ...

    def messages(
        self, nodes: Sequence[NodeStatus], shares: Sequence[float], blocks: Sequence[int] | None = None
    ) -> list[str]:
        """Lines about all nodes, from their statuses of a step; the same on every node.

        By rank: ``shares`` of the rows, and how many ``blocks`` a stage has, where the nodes are stages.
        """
        ...

    def own_messages(self) -> list[str]:
        """New lines about this node, each of them once."""
        ...


class NoThrottle:
    """Never rests; a status has tokens and seconds only."""

    def begin_step(self, micro_batches: int) -> None:
        """Does nothing."""

    def before_micro_batch(self) -> None:
        """Returns at once."""

    def step_computed(self) -> None:
        """Does nothing."""

    def working(self) -> AbstractContextManager[None]:
        """Does nothing."""
        return nullcontext()

    def waiting(self) -> AbstractContextManager[None]:
        """Does nothing."""
        return nullcontext()

    def status(self, tokens: int, seconds: float) -> NodeStatus:
        """Speed alone."""
        return NodeStatus(tokens=tokens, busy_seconds=seconds)

    def messages(
        self,
        nodes: Sequence[NodeStatus],  # noqa: ARG002
        shares: Sequence[float],  # noqa: ARG002
        blocks: Sequence[int] | None = None,  # noqa: ARG002
    ) -> list[str]:
        """None."""
        return []

    def own_messages(self) -> list[str]:
        """None."""
        return []
