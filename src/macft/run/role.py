"""What a rank of a run is among the others, known before anything is loaded."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from macft.collective.base import Collective
from macft.collective.elastic import ElasticCollective
from macft.config.schema import TrainConfig


@dataclass(frozen=True)
class Role:
    """What this rank does besides its part of each step.

    Attributes:
        is_newcomer: It joins a run that is under way.
        is_main: It reports the run and writes its results, as long as it isn't lost.
        has_own_disk: Its folder is on a machine of its own, as far as the topology says.
        has_own_folder: It writes into a run folder of its own.
    """

    is_newcomer: bool
    is_main: bool
    has_own_disk: bool
    has_own_folder: bool

    @classmethod
    def of(cls, config: TrainConfig, collective: Collective) -> Role:
        """That of this rank."""
        is_newcomer = isinstance(collective, ElasticCollective) and not collective.is_member
        is_main = collective.rank == 0 and not is_newcomer
        has_own_disk = config.topology.kind in ("hosts", "ssh")
        has_own_folder = is_main or has_own_disk or config.topology.join is not None
        return cls(is_newcomer, is_main, has_own_disk, has_own_folder)


def host_name(config: TrainConfig, collective: Collective) -> str:
    """This node's name in messages."""
    if isinstance(collective, ElasticCollective) and collective.is_member:
        return collective.members.names[collective.rank]
    hosts = config.topology.hosts
    return hosts[collective.rank] if len(hosts) == collective.world_size else platform.node()


def planned_world_size(collective: Collective) -> int:
    """How many nodes the run has, as far as a newcomer knows yet."""
    return len(collective.members.ids) if isinstance(collective, ElasticCollective) else collective.world_size
