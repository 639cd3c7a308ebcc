"""This node among the others: its rows, its rests, and what the nodes say to each other with each step."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace

from macft.collective.base import Collective
from macft.collective.elastic import ElasticCollective
from macft.parallel.balance import ShareBalancer
from macft.parallel.node_status import NodeStatus
from macft.parallel.shares import DataShard
from macft.parallel.stage_layout import StageLayout
from macft.parallel.stage_places import StagePlaces
from macft.training.node_messages import NodeMessages
from macft.training.throttle import Throttle


class NodeCoordinator:
    """Shares, throttle, statuses and messages of a run's nodes.

    Every decision follows from statuses that all ranks have alike, so that all ranks decide alike.

    Args:
        follow_speed: Whether shares follow the measured speeds and duties; not with DiLoCo, where they would change
            what is learned.
        places: Which blocks each rank computes; None: all of them.
    """

    def __init__(
        self,
        collective: Collective,
        balancer: ShareBalancer,
        throttle: Throttle,
        *,
        follow_speed: bool = True,
        places: StagePlaces | None = None,
    ):
        self.collective = collective
        self.elastic = collective if isinstance(collective, ElasticCollective) else None
        self.balancer = balancer
        self.places = places or StagePlaces(collective)
        self.statuses: list[NodeStatus] = []
        """Every rank's status of the newest step that all of them know."""
        self._throttle, self._follow_speed = throttle, follow_speed
        self._messages = NodeMessages(collective, throttle.own_messages)

    @property
    def shard(self) -> DataShard:
        """Which rows of the next step are this rank's."""
        return self.places.shard(self.balancer.shares)

    @property
    def wants_change(self) -> bool:
        """Whether this rank knows of a node that wants to join."""
        return self.elastic is not None and self.elastic.wants_change

    def begin_step(self, micro_batches: int) -> None:
        """Announces a step of so many micro-batches of this rank."""
        self._throttle.begin_step(micro_batches)

    def before_micro_batch(self) -> None:
        """Rests if this node has to.

        Raises:
            MembershipChanged: a node was lost, so the step can't be completed.
        """
        self._throttle.before_micro_batch()
        if self.elastic is not None:
            self.elastic.check()

    def step_computed(self) -> None:
        """This rank's part of the step is computed."""
        self._throttle.step_computed()

    def working(self) -> AbstractContextManager[None]:
        """Surrounds work that is not part of a step."""
        return self._throttle.working()

    def status(self, tokens: int, seconds: float) -> NodeStatus:
        """This rank's status after its part of a step: ``tokens`` tokens in ``seconds``."""
        return replace(self._throttle.status(tokens, seconds), messages=self._messages.collect())

    def end_step(self) -> list[str]:
        """Sets the shares of the next steps from :attr:`statuses`; returns lines to show.

        Collective: every rank must call it.
        """
        if self._follow_speed:
            self.balancer.observe(self.statuses)
        shown = self._throttle.messages(self.statuses, self.balancer.shares)
        return [*self._messages.exchange(self.statuses), *shown]

    def regrouped(self, balancer: ShareBalancer, layout: StageLayout) -> None:
        """The ranks have changed; ``balancer`` has the shares of the new ones, ``layout`` their blocks."""
        self.balancer, self.statuses = balancer, []
        self.places.change(layout)
