"""Lets guests in: each in a thread of its own, so that one that is slow or silent keeps nobody else waiting."""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from macft.errors import LaunchError
from macft.network.connections import ConnectionServer, end_if_unreachable
from macft.pairing.member import Member, version_objection
from macft.pairing.pake import NOT_THE_PROTOCOL, Channel, Guesses, WrongCode
from macft.pairing.protocol import HANDSHAKE_SECONDS, checked
from macft.rendezvous import keystore

_log = logging.getLogger("macft.pairing")


@dataclass
class Guest:
    """A machine that knows the code, and the connection to it; ``is_in``: it has been let in."""

    member: Member
    channel: Channel
    is_in: bool = False


class NotAdmitted(LaunchError):
    """A guest that cannot join; others still can."""


class Admission:
    """Listens for guests and lets those in who know ``code``.

    Args:
        own: This machine.
        code: As :func:`~macft.pairing.pake.new_code`.
        token: What a guest gets that is let in.
        room: For this many guests.
        most_wrong: Wrong codes, after which nobody is let in any more.
        show: Prints a line.

    Attributes:
        outcomes: A guest, or why a machine was not let in, for each that has come; in order.
        port: Where it listens, on all addresses.
    """

    def __init__(
        self, own: Member, code: str, token: bytes, *, room: int, most_wrong: int, show: Callable[[str], None]
    ):
        self.outcomes: queue.SimpleQueue[Guest | WrongCode | NotAdmitted] = queue.SimpleQueue()
        self._own, self._code, self._token, self._room, self._show = own, code, token, room, show
        self._guesses = Guesses(most_wrong)
        self._lock, self._is_over = threading.Lock(), threading.Event()
        self._guests: list[Guest] = []
        server = socket.create_server(("0.0.0.0", 0))
        self._connections = ConnectionServer(server, self._serve, seconds=HANDSHAKE_SECONDS, name="pairing")
        self.port = self._connections.port

    def guests(self) -> list[Guest]:
        """Those who have been let in and are here, in the order in which they came."""
        with self._lock:
            here = [guest for guest in self._guests if not guest.channel.has_ended]
            for guest in self._guests:
                if guest not in here and guest.is_in:
                    self._show(f"{guest.member.name} has left")
            self._guests = here
            return [guest for guest in here if guest.is_in]

    def close(self) -> None:
        """Lets nobody in any more, and ends the connections to all guests."""
        self._connections.close()
        self._is_over.set()

    def _serve(self, connection: socket.socket, is_known: Callable[[], None]) -> None:
        address = "a machine"
        try:
            address = str(connection.getpeername()[0])
            guest = self._admit(connection, address, is_known)
        except WrongCode as error:
            self.outcomes.put(error)
        except (LaunchError, OSError) as error:
            self.outcomes.put(NotAdmitted(f"{address}: {error}"))
        else:
            self.outcomes.put(guest)
            self._is_over.wait()

    def _admit(self, connection: socket.socket, address: str, is_known: Callable[[], None]) -> Guest:
        end_if_unreachable(connection)
        channel = Channel(connection, self._code, is_host=True, guesses=self._guesses)
        is_known()
        member = Member.from_message(channel.receive(HANDSHAKE_SECONDS))
        guest = self._enter(Guest(member, channel), address)
        try:
            channel.send({"token": self._token})
            # Only now does its probe answer those who send the token, and a measurement can begin at once.
            if checked(channel.receive(HANDSHAKE_SECONDS)).get("ready") is not True:
                raise LaunchError(NOT_THE_PROTOCOL)
        except LaunchError:
            with self._lock, contextlib.suppress(ValueError):  # it is known already that it has left
                self._guests.remove(guest)
            raise
        with self._lock:
            guest.is_in = True
            here = sum(other.is_in for other in self._guests) + 1
            _log.info("%s has joined, %d of %d", guest.member.name, here, self._room + 1)
            self._show(f"{guest.member.name} has joined ({here} of {self._room + 1})")
        return guest

    def _enter(self, guest: Guest, address: str) -> Guest:
        """``guest`` among the others, with a name of its own. Raises LaunchError if it doesn't fit; it is told why."""
        self.guests()
        with self._lock:
            others = [self._own, *(other.member for other in self._guests)]
            objection = version_objection(guest.member) or _key_objection(guest.member, others)
            if not objection and len(self._guests) == self._room:
                objection = f"the cluster has its {self._room + 1} machines already; `init --nodes` says how many"
            if objection:
                guest.channel.send({"refused": objection})
                raise LaunchError(objection)
            guest = replace(guest, member=self._with_free_name(guest.member, address, others))
            self._guests.append(guest)
            return guest

    def _with_free_name(self, member: Member, address: str, others: Sequence[Member]) -> Member:
        """``member``, numbered if another machine of the cluster has its name."""
        name = keystore.free_name(member.name, [other.name for other in others])
        if name != member.name:
            self._show(
                f"two machines are named {member.name}; the one at {address} is called {name} here (to rename it: "
                "System Settings > General > Sharing > Local hostname)"
            )
        return replace(member, name=name)


def _key_objection(member: Member, others: Sequence[Member]) -> str:
    """Why a machine with this key can't join; empty if it can."""
    if same := [other.name for other in others if other.key == member.key]:
        return (
            f"{member.name} has the key of {same[0]}: it is the same machine, or was copied from it; on a copy, remove "
            "the file `secret` in the folder that `python -m macft.keys make` names, and join again"
        )
    return ""
