"""This node among the others: its rows, its rests, and what the nodes say to each other with each step."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace

from macft.collective.base import Collective
from macft.collective.elastic import ElasticCollective
from macft.device import fault_points
from macft.parallel.balance import ShareBalancer
from macft.parallel.node_status import NodeStatus
from macft.parallel.shares import DataShard
from macft.parallel.stage_balance import StageBalancer
from macft.parallel.stage_layout import StageLayout
from macft.parallel.stage_places import StagePlaces
from macft.report.events import BlocksMoved
from macft.training.node_fit import NodeFit
from macft.training.node_messages import NodeMessages
from macft.training.throttle import Throttle

_LONGEST = 1000


class NodeCoordinator:
    """Shares, throttle, statuses and messages of a run's nodes.

    Every decision follows from statuses that all ranks have alike, so that all ranks decide alike.

    Args:
        follow_speed: Whether shares follow the measured speeds and duties; not with DiLoCo, where they would change
            what is learned.
        places: Which blocks each rank computes; None: all of them.
        stages: Measures the stages, where they may hand over blocks.
        fit: Whether this node's memory holds its part; None: it always does.
    """

    def __init__(
        self,
        collective: Collective,
        balancer: ShareBalancer,
        throttle: Throttle,
        *,
        follow_speed: bool = True,
        places: StagePlaces | None = None,
        stages: StageBalancer | None = None,
        fit: NodeFit | None = None,
    ):
        self.collective = collective
        self.elastic = collective if isinstance(collective, ElasticCollective) else None
        self.balancer = balancer
        self.places = places or StagePlaces(collective)
        self.places.waiting = throttle.waiting
        self.stages = stages
        self.lacking: list[str] = []
        """What the members' memories lack, a line each; the run can't go on while there is something."""
        self._fit = fit
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
        """Announces a step of this many micro-batches of this rank."""
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
            self.balancer.observe([_as_stage(status) for status in self.statuses])
        layout = self.places.layout
        blocks = _counts(layout, self.collective.world_size) if layout.has_stages else None
        shown = self._throttle.messages(self.statuses, self.balancer.shares, blocks)
        return [*self._messages.exchange(self.statuses), *shown]

    def hand_over(self, step: int) -> BlocksMoved | None:
        """After ``step`` updates: lets a slow or hot stage hand over blocks, if a step gets clearly faster.

        Collective: every rank must call it, with :attr:`statuses` that all have alike.
        """
        stages, before = self.stages, self.places.layout
        if stages is None or not stages.observe(self.statuses, before):
            return None
        speeds = stages.speeds
        found = self.places.improvement(speeds)
        if found is None:
            return None
        fault_points.reach("hand_over")
        if self._obstacles(found.layout):
            return None
        self._take()
        self.places.hand_over(found.layout)
        stages.layout_changed()
        return BlocksMoved(
            step=step,
            before=_counts(before, self.collective.world_size),
            blocks=self.blocks,
            reasons=list(speeds.reasons),
            gain=found.gain,
            layout=found.layout.described(self.collective.world_size),
            spans=[_span(found.layout.blocks_of(rank)) for rank in range(self.collective.world_size)],
        )

    @property
    def blocks(self) -> list[int]:
        """How many blocks each rank's stage has, by rank; empty where all ranks have all."""
        layout = self.places.layout
        is_pipeline = layout.has_stages or self.stages is not None
        return _counts(layout, self.collective.world_size) if is_pipeline else []

    def regrouped(self, balancer: ShareBalancer, layout: StageLayout, stages: StageBalancer | None) -> None:
        """The ranks have changed; ``balancer`` has the shares of the new ones, ``layout`` their blocks.

        Collective: every rank must call it. Afterwards :attr:`lacking` says whether the run can go on.
        """
        self.balancer, self.statuses, self.stages = balancer, [], stages
        self.places.change(layout)
        self.lacking = self._obstacles(layout)
        self._take()

    def _obstacles(self, layout: StageLayout) -> list[str]:
        """What the ranks lack for their parts of ``layout``. A collective call."""
        collective, own = self.collective, ""
        if self._fit is not None:
            own = self._fit.obstacle(layout, collective.rank, collective.world_size)
        told = collective.all_gather(own.encode()[:_LONGEST])
        names = (
            self.elastic.members.names if self.elastic is not None else [f"rank {rank}" for rank in range(len(told))]
        )
        return [f"{name}: {text.decode(errors='replace')}" for name, text in zip(names, told, strict=True) if text]

    def _take(self) -> None:
        if self._fit is not None and not self.lacking:
            self._fit.take()


def _as_stage(status: NodeStatus) -> NodeStatus:
    """A stage that waits for others rests meanwhile: it needs to rest less than its duty says."""
    if status.wait_seconds is None or status.paused or status.duty >= 1.0:
        return status
    computing = max(status.busy_seconds - status.wait_seconds, 1e-9)
    return replace(status, duty=min(1.0, status.duty * max(1.0, status.busy_seconds / computing)))


def _span(blocks: range) -> str:
    return f"{blocks[0]}-{blocks[-1]}" if blocks else ""


def _counts(layout: StageLayout, world_size: int) -> list[int]:
    return [len(layout.blocks_of(rank)) for rank in range(world_size)]
