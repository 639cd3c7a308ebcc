"""Meets the other ranks and joins the collective that the configuration names."""

from __future__ import annotations

from macft.collective.base import Collective
from macft.collective.mlx_group import MlxListener
from macft.collective.settings import CollectiveConfig
from macft.rendezvous.keystore import Keyring
from macft.rendezvous.rendezvous import connect_ring, join


def connect(
    server: str,
    *,
    rank: int,
    world_size: int,
    run_id: str,
    fingerprint: str,
    name: str,
    settings: CollectiveConfig,
    start_timeout: float,
    bind: str = "127.0.0.1:0",
    keyring: Keyring | None = None,
) -> Collective:
    """The collective of ``settings.backend``; see :func:`~macft.rendezvous.rendezvous.connect_ring`.

    MLX's own communication knows no encryption, so only the ring takes a ``keyring``.
    """
    if settings.backend == "ring":
        return connect_ring(
            server,
            rank=rank,
            world_size=world_size,
            run_id=run_id,
            fingerprint=fingerprint,
            name=name,
            settings=settings,
            start_timeout=start_timeout,
            bind=bind,
            keyring=keyring,
        )
    listener = MlxListener(bind.split("+")[0], settings)  # MLX has paths of its own
    try:
        membership = join(
            server,
            rank=rank,
            world_size=world_size,
            run_id=run_id,
            fingerprint=fingerprint,
            ring_address=listener.address,
            name=name,
            timeout=start_timeout,
        )
    except BaseException:
        listener.close()
        raise
    return listener.join(rank, membership.addresses, names=membership.names, secret=membership.ring_id)
