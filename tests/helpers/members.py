"""Members of an elastic run in this process, with real sockets."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from macft.collective.elastic import MembershipView
from macft.collective.ring.listener import Listener
from macft.collective.settings import CollectiveConfig
from macft.collective.solo import Solo
from macft.membership.elastic_ring import ElasticRing
from macft.membership.paxos import View
from macft.membership.service import MembershipService
from macft.rendezvous.keystore import Keyring

SETTINGS = CollectiveConfig(timeout=5.0, heartbeat=0.2)


class Node:
    """A member in this process, with a thread for its calls."""

    def __init__(self, name: str, keyring: Keyring | None):
        self.keyring = keyring
        self.membership = MembershipService(
            "127.0.0.1:0", name=name, settings=SETTINGS, keyring=keyring, must_match={"seed": "0"}, started="at noon"
        )
        self.ring: ElasticRing | None = None
        self.thread = ThreadPoolExecutor(1)

    def listener(self) -> Listener:
        return Listener("127.0.0.1:0", SETTINGS, encrypted=self.keyring is not None)

    def enter(self, view: View, secret: bytes) -> None:
        self.ring = ElasticRing(self.membership, Solo(), view, secret=secret, open_listener=self.listener)

    def regroup(self) -> Future[MembershipView]:
        assert self.ring is not None
        return self.thread.submit(_regroup, self.ring)

    def close(self) -> None:
        self.thread.shutdown()
        if self.ring is not None:
            self.ring.close()
        else:
            self.membership.close()


def _regroup(ring: ElasticRing) -> MembershipView:
    assert ring.regroup(lambda _: True)
    return ring.members
