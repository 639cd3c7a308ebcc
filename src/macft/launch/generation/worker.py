"""A rank's process of a cluster that answers, started by :mod:`macft.launch.generation.cluster`.

Its first line of standard input is a :class:`WorkerRequest` as JSON. When standard input ends, because the process that
started it or the connection is gone, it ends at once: it has nothing to save.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace

from macft.cli.run_command import run_command
from macft.collective.base import Collective
from macft.collective.settings import CollectiveConfig
from macft.config.yaml import package_versions
from macft.errors import LaunchError
from macft.membership.join import MemberConfig, form_elastic_ring
from macft.rendezvous.connect import RankConfig, connect
from macft.rendezvous.keystore import run_keyring

_MAX_REQUEST = 65_536


@dataclass(frozen=True)
class WorkerRequest:
    """What a rank needs to meet the others.

    Attributes:
        server: Address of the rendezvous.
        rank: This rank.
        world_size: Number of ranks.
        run_id: The same for all.
        name: Of the machine, in messages.
        bind: Where the rank's ring listens; the membership service next to it.
        member_bind: Where its membership service listens.
        ring_bind: Where its later rings listen.
        timeout: Seconds to wait for the others.
        secret: The key of all ranks, in hexadecimal; empty without encryption.
        machine_share: The part of its machine's memory that the rank may use.
        collective: Values of the configuration group ``collective``.
    """

    server: str
    rank: int
    world_size: int
    run_id: str
    name: str
    bind: str
    member_bind: str
    ring_bind: str
    timeout: float
    secret: str
    machine_share: float
    collective: dict[str, object]

    def at(self, server: str) -> WorkerRequest:
        """The same with the rendezvous at ``server``."""
        return replace(self, server=server)

    def to_line(self) -> bytes:
        """As a line of JSON."""
        return json.dumps(asdict(self)).encode() + b"\n"


def elastic_ring(request: WorkerRequest, stack: ExitStack) -> Collective:
    """The ring of all ranks, this one's part of it, which ``stack`` closes.

    Raises:
        RendezvousError, CollectiveError: the ranks do not come together.
    """
    settings = CollectiveConfig(**request.collective)  # type: ignore[arg-type]
    keyring = run_keyring(bytes.fromhex(request.secret)) if request.secret else None
    rank_config = RankConfig(
        server=request.server,
        rank=request.rank,
        world_size=request.world_size,
        run_id=request.run_id,
        must_match=package_versions(),
        name=request.name,
        timeout=request.timeout,
        keyring=keyring,
    )
    member = MemberConfig(
        bind=request.member_bind,
        ring_bind=request.ring_bind,
        name=request.name,
        settings=settings,
        keyring=keyring,
        must_match=package_versions(),
    )
    ring = stack.enter_context(connect(rank_config, settings, bind=request.bind))
    return stack.enter_context(form_elastic_ring(ring, member))


def main(_argv: Sequence[str]) -> None:
    """Follows the leader until it wants nothing more."""
    line = sys.stdin.buffer.readline(_MAX_REQUEST)
    try:
        request = WorkerRequest(**json.loads(line))
    except (ValueError, TypeError):
        raise LaunchError("the process that started this rank sent no valid request") from None
    threading.Thread(target=_end_with_launcher, name="launcher-watch", daemon=True).start()

    from macft.device.mlx_device import prepare_device
    from macft.run.generation.rank import GenerationRank, follow_leader

    with ExitStack() as stack:
        ring = elastic_ring(request, stack)
        prepare_device()
        follow_leader(GenerationRank(ring, name=request.name, machine_share=request.machine_share))


def _end_with_launcher() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(run_command(main))
