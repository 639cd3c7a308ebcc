"""What the trainer asks of a collective whose ranks come and go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from macft.collective.base import Collective


@dataclass(frozen=True)
class MembershipView:
    """Who takes part in ``generation``: ids, names and doors by rank; ``why`` others no longer do, by id.

    A newcomer may knock at any of the ``addresses``.
    """

    generation: int
    ids: tuple[str, ...]
    names: tuple[str, ...]
    addresses: tuple[str, ...]
    why: Mapping[str, str]


@runtime_checkable
class ElasticCollective(Collective, Protocol):
    """A collective whose calls raise MembershipChanged when a rank is lost; the others then regroup and go on."""

    @property
    def members(self) -> MembershipView:
        """Who takes part now."""
        ...

    @property
    def is_member(self) -> bool:
        """False for a newcomer that has not regrouped yet, or one that has stepped out."""
        ...

    @property
    def wants_change(self) -> bool:
        """Whether a node is at the door, so that all should regroup after this step."""
        ...

    def check(self) -> None:
        """Costs nothing; raises MembershipChanged where this collective is known not to go on."""
        ...

    def step_out(self) -> None:
        """Leaves the others. Until it has regrouped this node is by itself, like a newcomer."""
        ...

    def regroup(self, waiting: Callable[[str], bool]) -> bool:
        """Comes together anew with those who are there: rank and world size may be others then.

        ``waiting`` is told ten times a second whom this node waits for, and returns whether to go on; False if it does
        not.

        Raises:
            CollectiveError: the nodes hear each other, but can't come together.
        """
        ...
