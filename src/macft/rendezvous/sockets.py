"""The sockets of the rendezvous, which report why a connection was refused and the command that fixes it.

With a keyring both ends authenticate (CURVE): the server admits trusted keys only, and a rank connects only to a server
whose key it trusts.
"""

from __future__ import annotations

import socket
import time
from typing import NamedTuple

import zmq
from zmq.utils.monitor import _MonitorMessage, recv_monitor_message

from macft.collective.ring.security import Gate, Refused, encrypt_to
from macft.collective.wire import LINGER_SECONDS, bind, set_endpoint, split_address
from macft.errors import CollectiveError, RendezvousError
from macft.rendezvous.keystore import Keyring, own_name

MAX_MESSAGE_BYTES = 65_536
_FAILED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
_OTHER_MECHANISM = zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
_TRIES = 3
"""Handshakes that may fail before a rank gives up: a server that ends can break one, too."""
_GREETING_BYTES = 64
_MAX_REPORTED = 50


class RendezvousSocket:
    """The server's ROUTER at ``address`` ("host:port"), which records the connections that it refused.

    Raises:
        RendezvousError: the address cannot be listened on.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, keyring: Keyring | None):
        self.socket = _open(context, zmq.ROUTER)
        self.socket.router_mandatory = True  # sending to a rank that is gone raises
        self._gate = None if keyring is None else Gate(context, keyring.own)
        if self._gate is not None and keyring is not None:
            self._gate.guard(self.socket)
            self._gate.admit(keyring.members)
        self._monitor = _watch(context, self.socket, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
        self._reported: set[Refused | str] = set()
        try:
            self.address = bind(self.socket, address)
        except CollectiveError as error:
            self.close()
            raise RendezvousError(f"rendezvous: {error}") from None

    def refusals(self) -> list[str]:
        """A line for each connection refused since the last call, with the command that would admit it.

        After ``_MAX_REPORTED`` lines there are no more: whoever makes so many is not somebody who forgot a key.
        """
        lines: dict[Refused | str, str] = {}
        for refused in [] if self._gate is None else list(self._gate.refused):
            key = refused.key.hex()
            lines[refused] = (
                f"{refused.address} used a key that is not trusted here; if `python -m macft.keys show` prints "
                f"{key} there, run `python -m macft.keys trust NAME {key}` here"
            )
        while self._monitor.poll(0):
            if recv_monitor_message(self._monitor)["value"] == _OTHER_MECHANISM:
                how = "encrypted" if self._gate is None else "unencrypted"
                line = f"a node connected {how}, unlike this one; is collective.encryption the same on all nodes?"
                lines[line] = line
        new = {reason: line for reason, line in lines.items() if reason not in self._reported}
        new = dict(list(new.items())[: _MAX_REPORTED - len(self._reported)])
        self._reported |= new.keys()
        return list(new.values())

    def close(self) -> None:
        """Safe to call twice."""
        if not self.socket.closed:
            self.socket.disable_monitor()
        self._monitor.close()
        self.socket.close()
        if self._gate is not None:
            self._gate.close()


class _Connection(NamedTuple):
    sock: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]


class RendezvousClient:
    """A rank's connection to the server at ``address``. A context manager, which closes it.

    The address does not show which of the trusted machines the server is. So there is one connection for each trusted
    key, and the one that succeeds is used: only the holder of that key can read what is sent over it.

    Args:
        context: Owns the sockets.
        address: ``host:port``.
        keyring: This machine's keys. None: no encryption.
        message: Sent first, and again to a server that was started anew.

    Raises:
        RendezvousError: the address is malformed or unknown.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, keyring: Keyring | None, message: bytes):
        self._address, self._keyring, self._mechanism = address, keyring, ""
        self._message = message
        self._has_connected = False
        self._connections: list[_Connection] = []
        self._failures: dict[zmq.Socket[bytes], int] = {}
        self._poller = zmq.Poller()
        for key in [None] if keyring is None else keyring.members:
            sock = _open(context, zmq.DEALER)
            sock.linger = 0
            if keyring is not None and key is not None:
                encrypt_to(sock, keyring.own, key)
            connection = _Connection(sock, _watch(context, sock, _FAILED | zmq.EVENT_HANDSHAKE_SUCCEEDED))
            self._connections.append(connection)
            self._failures[sock] = 0
            for end in connection:
                self._poller.register(end, zmq.POLLIN)
            try:
                sock.connect(set_endpoint(sock, address))
            except CollectiveError as error:
                self.close()
                raise RendezvousError(f"rendezvous: {error}") from None
            sock.send(message)

    def receive(self, deadline: float) -> bytes | None:
        """The server's next message; None if there is none until ``deadline`` (``time.monotonic``).

        Raises:
            RendezvousError: it refuses this rank, or its key is not trusted here; says which command fixes it.
        """
        while (remaining := deadline - time.monotonic()) > 0:
            ready = dict(self._poller.poll(int(remaining * 1000) + 1))
            for connection in list(self._connections):
                if connection.sock in ready:
                    return bytes(connection.sock.recv())
                if connection.monitor in ready and not connection.monitor.closed:
                    self._handle_event(connection, recv_monitor_message(connection.monitor))
        return None

    def close(self) -> None:
        """Safe to call twice."""
        for connection in self._connections:
            self._end(connection)
        self._connections = []

    def __enter__(self) -> RendezvousClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _handle_event(self, connection: _Connection, message: _MonitorMessage) -> None:
        event, keyring = message["event"], self._keyring
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            for other in self._connections:
                if other is not connection:
                    self._end(other)
            self._connections = [connection]
            if self._has_connected:
                connection.sock.send(self._message)
            self._has_connected = True
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and keyring is not None:
            command = f"python -m macft.keys trust {own_name()} {keyring.own.public.hex()}"
            raise self._error(f"it does not trust this machine's key; run there: {command}")
        else:
            self._failures[connection.sock] += 1
            self._raise_known_reason()

    def _raise_known_reason(self) -> None:
        """Raises if the reason of a failed handshake is known; ZeroMQ's own events are not reliable here."""
        keyring = self._keyring
        self._mechanism = self._mechanism or _mechanism(self._address)
        if self._mechanism == ("CURVE" if keyring is None else "NULL"):
            how = ("encrypts", "does not") if keyring is None else ("does not encrypt", "does")
            raise self._error(f"it {how[0]}, this node {how[1]}; use the same collective.encryption on all nodes")
        if keyring is not None and self._mechanism and all(self._failures[c.sock] >= _TRIES for c in self._connections):
            known = ", ".join(keyring.trusted) or "nobody yet"
            fix = "run `python -m macft.keys show` there and type here the line that it prints"
            raise self._error(f"its key is not trusted here ({known}); {fix}")

    def _error(self, text: str) -> RendezvousError:
        return RendezvousError(f"rendezvous at {self._address}: {text}")

    def _end(self, connection: _Connection) -> None:
        for end in connection:
            if end in self._poller:
                self._poller.unregister(end)
        if not connection.sock.closed:
            connection.sock.disable_monitor()
        connection.sock.close()
        connection.monitor.close()


def _mechanism(address: str) -> str:
    """The security mechanism that the ZeroMQ socket at ``host:port`` announces (RFC 23); empty if it does not."""
    # Only up to the version: if it read a mechanism that it does not use, it would disconnect before sending its own.
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01"
    answer = b""
    try:
        with socket.create_connection(split_address(address), timeout=2.0) as connection:
            connection.sendall(greeting)
            while len(answer) < _GREETING_BYTES and (data := connection.recv(_GREETING_BYTES - len(answer))):
                answer += data
    except OSError:
        return ""
    return answer[12:32].rstrip(b"\0").decode(errors="replace")


def _open(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    sock: zmq.Socket[bytes] = context.socket(kind)
    sock.linger = int(LINGER_SECONDS * 1000)
    sock.maxmsgsize = MAX_MESSAGE_BYTES
    return sock


def _watch(context: zmq.Context[zmq.Socket[bytes]], sock: zmq.Socket[bytes], events: int) -> zmq.Socket[bytes]:
    address = f"inproc://monitor-{id(sock)}"
    sock.monitor(address, events)
    monitor: zmq.Socket[bytes] = context.socket(zmq.PAIR)
    monitor.linger = 0
    monitor.connect(address)
    return monitor
