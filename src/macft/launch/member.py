"""What a rank needs to be a member of an elastic run."""

from __future__ import annotations

from collections.abc import Sequence

from macft.config.schema import TrainConfig
from macft.config.yaml import fingerprint
from macft.membership.join import MEMBERSHIP_PORT, MemberConfig
from macft.rendezvous.hosts import bind_addresses
from macft.rendezvous.keystore import Keyring

ANY_PORT_HERE = (("127.0.0.1", 0),)
"""For a rank that only others on this machine reach."""


def member_config(
    config: TrainConfig, paths: Sequence[tuple[str, int]], *, name: str, keyring: Keyring | None
) -> MemberConfig:
    """The member called ``name`` that listens at ``paths``: address and ``topology.port`` of each cable, 0 for any."""
    return MemberConfig(
        bind=bind_addresses(paths, MEMBERSHIP_PORT),
        ring_bind=bind_addresses(paths, 1),
        name=name,
        settings=config.collective,
        keyring=keyring,
        fingerprint=fingerprint(config, of_newcomer=True),
        started=str(config.dataset.template_time),
    )
