"""What the trainer needs from a collective whose ranks change during the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from macft.collective.base import Collective
from macft.collective.matching import Texts


@dataclass(frozen=True)
class MembershipView:
    """The members of one ``generation``.

    Attributes:
        generation: Counts the rings of the run.
        ids: Member ids, by rank.
        names: Host names, by rank.
        addresses: Addresses of the membership services, by rank. A newcomer may contact any of them.
        why: Why a former member left, by id.
    """

    generation: int
    ids: tuple[str, ...]
    names: tuple[str, ...]
    addresses: tuple[str, ...]
    why: Mapping[str, str]


@runtime_checkable
class ElasticCollective(Collective, Protocol):
    """A collective whose calls raise MembershipChanged when a rank is lost; the other ranks then call ``regroup``."""

    contents: Texts
    """What all members' data and weights are, as texts by name; a newcomer has them from the run. Empty until known."""

    @property
    def members(self) -> MembershipView:
        """The current members."""
        ...

    @property
    def is_member(self) -> bool:
        """False for a newcomer that has not regrouped yet, and for a node that has left."""
        ...

    @property
    def wants_change(self) -> bool:
        """Whether a node waits to join, so that all ranks should regroup after this step."""
        ...

    @property
    def stop_wanted(self) -> bool:
        """Whether any member's user wants, or wanted, the run to stop, as far as this node has heard."""
        ...

    def tell_stop(self, wanted: Callable[[], bool]) -> None:
        """Tells the others as soon as ``wanted()``, which is called in another thread, is true."""
        ...

    def check(self) -> None:
        """Raises MembershipChanged if this ring is known to have ended. No communication."""
        ...

    def step_out(self) -> None:
        """Leaves the other members. Until it regroups, this node is alone, like a newcomer."""
        ...

    def regroup(self, waiting: Callable[[str], bool]) -> bool:
        """Forms a new ring with all reachable members; rank and world size may change.

        Args:
            waiting: Called about ten times a second with a description of what this node waits for, which continues the
                sentence "this node waits for", for example ``studio to finish the step``. If it returns False, this
                node stops waiting.

        Returns:
            False if ``waiting`` returned False. This node is then alone, as after :meth:`step_out`.

        Raises:
            PeerLost: all other nodes have ended, or this node's membership service has.
            CollectiveError: the nodes receive each other's heartbeats but cannot form a ring, or a port cannot be
                listened on.
        """
        ...
