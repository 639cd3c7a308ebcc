"""The connections of a node's membership service to another node."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import zmq
from zmq.utils.monitor import recv_monitor_message

from macft.collective.ring.security import encrypt_to
from macft.collective.settings import CollectiveConfig
from macft.collective.wire import set_endpoint, split_paths
from macft.errors import CollectiveError
from macft.membership.paxos import MemberRecord
from macft.rendezvous.keystore import Keyring

MAX_QUEUED = 64
"""Messages that wait to be sent on a connection, or are read in one go."""


@dataclass
class _PathConnection:
    sock: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]
    is_open: bool = True


class PeerConnection:
    """The connections to another node: a DEALER over each of its cables. What cannot be sent at once is dropped."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        member: MemberRecord,
        keyring: Keyring | None,
        settings: CollectiveConfig,
    ):
        self.member, self.paths = member, split_paths(member.address)
        self._connections: list[_PathConnection] = []
        for path in self.paths:
            sock: zmq.Socket[bytes] = context.socket(zmq.DEALER)
            sock.linger, sock.immediate, sock.sndhwm = 0, True, MAX_QUEUED
            sock.heartbeat_ivl = int(settings.heartbeat * 1000)
            sock.heartbeat_timeout = int(settings.timeout * 1000)
            sock.reconnect_ivl_max = 1000
            if keyring is not None:
                encrypt_to(sock, keyring.own, member.key)
            monitor_address = f"inproc://peer-{id(sock)}"
            sock.monitor(monitor_address, zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED)
            monitor: zmq.Socket[bytes] = context.socket(zmq.PAIR)
            monitor.linger = 0
            monitor.connect(monitor_address)
            with contextlib.suppress(CollectiveError):  # a name that is unknown here; another path may work
                sock.connect(set_endpoint(sock, path))
            self._connections.append(_PathConnection(sock, monitor))

    def send(self, data: bytes) -> None:
        """Sends over every open connection."""
        for connection in self._connections:
            with contextlib.suppress(zmq.Again):
                connection.sock.send(data, zmq.NOBLOCK)

    def is_broken(self) -> bool:
        """Whether no connection is open."""
        for connection in self._connections:
            while connection.monitor.poll(0):
                connection.is_open = recv_monitor_message(connection.monitor)["event"] == zmq.EVENT_CONNECTED
        return not any(connection.is_open for connection in self._connections)

    def close(self) -> None:
        """Safe to call twice."""
        for connection in self._connections:
            if not connection.sock.closed:
                connection.sock.disable_monitor()
            connection.sock.close()
            connection.monitor.close()
