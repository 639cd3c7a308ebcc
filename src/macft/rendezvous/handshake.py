"""The rendezvous' sockets: who comes in, and, of a connection that fails, why and what mends it.

With a keyring both ends prove who they are (CURVE): the server lets in trusted keys only, and a rank speaks only to
a server whose key it trusts. Without one, neither.
"""

from __future__ import annotations

import socket
import time
from typing import Any, NamedTuple

import zmq
from zmq.utils.monitor import recv_monitor_message

from macft.collective.security import Gate, Refused, encrypt_to
from macft.collective.wire import LINGER_SECONDS, bind, set_endpoint, split_address
from macft.errors import CollectiveError, RendezvousError
from macft.rendezvous.keystore import Keyring, own_name

MAX_MESSAGE_BYTES = 65_536
_FAILED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
_OTHER_MECHANISM = zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
_TRIES = 3
"""Handshakes that fail before a rank gives up: a server that ends may break one, too."""
_GREETING_BYTES = 64


class RendezvousSocket:
    """The server's ROUTER at ``address`` ("host:port"), which also takes note of whom it did not let in.

    Raises:
        RendezvousError: the address can't be listened on.
    """

    def __init__(self, context: zmq.Context[Any], address: str, keyring: Keyring | None):
        self.socket = _open(context, zmq.ROUTER)
        self.socket.router_mandatory = True  # tells of a rank that has gone
        self._gate = None if keyring is None else Gate(context, keyring.own)
        if self._gate is not None and keyring is not None:
            self._gate.guard(self.socket)
            self._gate.admit(keyring.members)
        self._monitor = _watch(context, self.socket, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
        self._told: set[Refused | str] = set()
        try:
            self.address = bind(self.socket, address)
        except CollectiveError as error:
            self.close()
            raise RendezvousError(f"rendezvous: {error}") from None

    def refusals(self) -> list[str]:
        """One line for each one not let in since the last call, with what would let it in."""
        lines: dict[Refused | str, str] = {}
        for refused in [] if self._gate is None else list(self._gate.refused):
            key = refused.key.hex()
            lines[refused] = (
                f"{refused.address} came with a key that is not trusted here; if `python -m macft.keys show` prints "
                f"{key} there, run `python -m macft.keys trust NAME {key}` here"
            )
        while self._monitor.poll(0):
            if recv_monitor_message(self._monitor)["value"] == _OTHER_MECHANISM:
                how = "encrypted" if self._gate is None else "unencrypted"
                line = f"a node came {how}, unlike this one; is collective.encryption the same on all nodes?"
                lines[line] = line
        fresh = [line for reason, line in lines.items() if reason not in self._told]
        self._told |= lines.keys()
        return fresh

    def close(self) -> None:
        """Safe to call twice."""
        if not self.socket.closed:
            self.socket.disable_monitor()
        self._monitor.close()
        self.socket.close()
        if self._gate is not None:
            self._gate.close()


class _Line(NamedTuple):
    sock: zmq.Socket[Any]
    monitor: zmq.Socket[Any]


class RendezvousClient:
    """A rank's connection to the server at ``address``; leaves as a context manager.

    Which of the trusted machines the server is, the address does not tell. So there is a connection for each key, and
    the one that succeeds is used: only the holder of that key can read what goes over it.

    Raises:
        RendezvousError: the address is malformed or unknown.
    """

    def __init__(self, context: zmq.Context[Any], address: str, keyring: Keyring | None, message: bytes):
        self._address, self._keyring, self._mechanism = address, keyring, ""
        self._lines: list[_Line] = []
        self._failures: dict[zmq.Socket[Any], int] = {}
        self._poller = zmq.Poller()
        for key in [None] if keyring is None else keyring.members:
            sock = _open(context, zmq.DEALER)
            sock.linger = 0
            if keyring is not None and key is not None:
                encrypt_to(sock, keyring.own, key)
            line = _Line(sock, _watch(context, sock, _FAILED | zmq.EVENT_HANDSHAKE_SUCCEEDED))
            self._lines.append(line)
            self._failures[sock] = 0
            for end in line:
                self._poller.register(end, zmq.POLLIN)
            try:
                sock.connect(set_endpoint(sock, address))
            except CollectiveError as error:
                self.close()
                raise RendezvousError(f"rendezvous: {error}") from None
            sock.send(message)

    def receive(self, deadline: float) -> bytes | None:
        """The server's next message; None if none has come at ``deadline`` (``time.monotonic``).

        Raises:
            RendezvousError: it does not let this rank in, or is none that is trusted here; says what mends it.
        """
        while (left := deadline - time.monotonic()) > 0:
            ready = dict(self._poller.poll(int(left * 1000) + 1))
            for line in list(self._lines):
                if line.sock in ready:
                    return bytes(line.sock.recv())
                if line.monitor in ready and not line.monitor.closed:
                    self._note(line, recv_monitor_message(line.monitor))
        return None

    def close(self) -> None:
        """Safe to call twice."""
        for line in self._lines:
            self._end(line)
        self._lines = []

    def __enter__(self) -> RendezvousClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _note(self, line: _Line, event: Any) -> None:
        what, keyring = event["event"], self._keyring
        if what == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            for other in self._lines:
                if other is not line:
                    self._end(other)
            self._lines = [line]
        elif what == zmq.EVENT_HANDSHAKE_FAILED_AUTH and keyring is not None:
            command = f"python -m macft.keys trust {own_name()} {keyring.own.public.hex()}"
            raise self._error(f"it does not trust this machine's key; run there: {command}")
        else:
            self._failures[line.sock] += 1
            self._explain()

    def _explain(self) -> None:
        """Raises if the reason of a failed handshake is clear; ZeroMQ's own account of it is not dependable."""
        keyring = self._keyring
        self._mechanism = self._mechanism or _mechanism(self._address)
        if self._mechanism == ("CURVE" if keyring is None else "NULL"):
            how = ("encrypts", "does not") if keyring is None else ("does not encrypt", "does")
            raise self._error(f"it {how[0]}, this node {how[1]}; set collective.encryption alike on all nodes")
        if keyring is not None and self._mechanism and all(self._failures[at.sock] >= _TRIES for at in self._lines):
            known = ", ".join(keyring.trusted) or "nobody yet"
            mend = "run `python -m macft.keys show` there and type here the line that it prints"
            raise self._error(f"its key is none that is trusted here ({known}); {mend}")

    def _error(self, text: str) -> RendezvousError:
        return RendezvousError(f"rendezvous at {self._address}: {text}")

    def _end(self, line: _Line) -> None:
        for end in line:
            if end in self._poller:
                self._poller.unregister(end)
        if not line.sock.closed:
            line.sock.disable_monitor()
        line.sock.close()
        line.monitor.close()


def _mechanism(address: str) -> str:
    """The security mechanism that the ZeroMQ at ``host:port`` announces (RFC 23); empty if it does not say."""
    # No more than the version: told of a mechanism that it does not use, it would hang up without saying its own.
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


def _open(context: zmq.Context[Any], kind: int) -> zmq.Socket[Any]:
    sock: zmq.Socket[Any] = context.socket(kind)
    sock.linger = int(LINGER_SECONDS * 1000)
    sock.maxmsgsize = MAX_MESSAGE_BYTES
    return sock


def _watch(context: zmq.Context[Any], sock: zmq.Socket[Any], events: int) -> zmq.Socket[Any]:
    address = f"inproc://monitor-{id(sock)}"
    sock.monitor(address, events)
    monitor: zmq.Socket[Any] = context.socket(zmq.PAIR)
    monitor.linger = 0
    monitor.connect(address)
    return monitor
