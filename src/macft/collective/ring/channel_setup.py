"""Opening channels: ports and secrets are exchanged over the ring, then each rank connects to those it sends to."""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import NoReturn

import msgpack

from macft.collective.ring.channels import RingWatch, StreamChannels
from macft.collective.ring.ending import Failure
from macft.collective.ring.handshake import RingIdentity
from macft.collective.ring.link import Links
from macft.collective.ring.listener import Listener
from macft.collective.ring.stream import SECRET_BYTES, StreamIn, StreamOut, StreamPort
from macft.collective.wire import MAX_PATHS, Header, Kind, split_address, split_paths
from macft.errors import CollectiveError, PeerLost, PeerTimeout, ProtocolError

_REASON_SECONDS = 1.0
"""How long after a channel has ended the reason may take to arrive over the ring."""

Offer = list[tuple[int, bytes]]
"""Port and secret of each path to a rank; port 0 where it can't be listened on."""


class ChannelPorts:
    """One rank's open ports for the channels from the ranks ``sources``.

    Args:
        address: ``host:port`` of this rank's listener, several paths joined by ``+``. Other ports of the same hosts
            are opened.

    Raises:
        CollectiveError: no port can be opened.
    """

    def __init__(self, address: str, sources: Collection[int], *, encrypted: bool):
        self._ports: dict[int, list[StreamPort | None]] = {source: [] for source in sources}
        self._stack = ExitStack()
        failure: CollectiveError | None = None
        for source in sources:
            for path in split_paths(address):
                try:
                    port = StreamPort(split_address(path)[0], encrypted=encrypted)
                except CollectiveError as error:  # an unplugged cable takes its address away
                    failure = error
                    self._ports[source].append(None)
                    continue
                self._stack.callback(port.close)
                self._ports[source].append(port)
            if failure is not None and not any(self._ports[source]):
                self.close()
                raise failure

    def offers(self) -> bytes:
        """What the others need to connect."""
        listed = {
            source: [[port.port, port.secret] if port is not None else [0, b""] for port in ports]
            for source, ports in self._ports.items()
        }
        packed: bytes = msgpack.packb(listed)
        return packed

    def accept(self, max_bytes: int, seconds: float, watch: Callable[[], None]) -> dict[int, StreamIn]:
        """The streams by sending rank, without those that did not come within ``seconds``."""
        found: dict[int, StreamIn] = {}
        deadline = time.monotonic() + seconds
        while len(found) < len(self._ports) and time.monotonic() < deadline:
            waiting = [port for source in self._ports if source not in found for port in self._ports[source] if port]
            select.select([sock for port in waiting for sock in port.sockets], [], [], 0.1)
            for source, ports in self._ports.items():
                for port in ports:
                    if source not in found and port and (stream := port.accept(max_bytes)) is not None:
                        found[source] = stream
            watch()
        return found

    def close(self) -> None:
        """Accepts no more streams. Safe to call twice."""
        self._stack.close()


def read_offers(blob: bytes, to_rank: int) -> Offer:
    """What a rank that sent ``blob`` offers to ``to_rank``.

    Raises:
        ValueError: it offers nothing, or nothing valid.
    """
    try:
        listed = msgpack.unpackb(blob, strict_map_key=False)[to_rank]
        offer = [(int(port), bytes(secret)) for port, secret in listed]
    except (ValueError, TypeError, KeyError, msgpack.UnpackException):
        raise ValueError("no valid offer of a channel") from None
    is_valid = all(port == 0 or (0 < port <= 65_535 and len(secret) == SECRET_BYTES) for port, secret in offer)
    if not 0 < len(offer) <= MAX_PATHS or not is_valid:
        raise ValueError("no valid offer of a channel")
    return offer


def connect(address: str, offer: Offer, max_bytes: int, *, encrypted: bool) -> StreamOut | None:
    """The stream to the rank at ``address``, over the first of its paths that works; None if none does."""
    for path, (port, secret) in zip(split_paths(address), offer, strict=False):
        if port and (stream := StreamOut.connect(path, port, secret, max_bytes, encrypted=encrypted)) is not None:
            return stream
    return None


class LinksWatch(RingWatch):
    """Watches a ring's ranks through its links."""

    def __init__(self, links: Links, identity: RingIdentity, patience: float):
        self.patience = patience
        self._links, self._identity = links, identity

    def name(self, rank: int) -> str:
        """See :class:`~macft.collective.ring.handshake.RingIdentity`."""
        return self._identity.name(rank)

    def watch(self, call: str) -> None:
        """Raises if a rank is known to be gone."""
        if self._links.ending.failure is not None:
            raise self._links.ending.failure
        # Data from the left is of later calls. Whatever ends the ring comes from the right too, from rank to rank.
        self._links.wait(call, left=False, right=True, seconds=0.0)
        if all(path.is_gone for path in self._links.recv_paths):
            self.explain(self._identity.left, call)

    def explain(self, peer: int, call: str) -> NoReturn:
        """Raises what the ring says of ``peer``, or what a probe finds."""
        if self._links.ending.failure is not None:
            raise self._links.ending.failure
        deadline = time.monotonic() + _REASON_SECONDS
        while time.monotonic() < deadline:
            self._links.wait(call, left=True, right=True, seconds=0.05)
        self._links.ending.diagnose(peer, call)

    def fail(self, kind: Failure, culprit: int, text: str) -> NoReturn:
        """Ends the ring with an error."""
        self._links.ending.fail(kind, culprit, text)


def open_channels(
    links: Links,
    identity: RingIdentity,
    listener: Listener,
    all_gather: Callable[[bytes], list[bytes]],
    pairs: Collection[tuple[int, int]],
    purpose: str,
) -> StreamChannels:
    """See :meth:`~macft.collective.base.Collective.open_channels`."""
    rank, settings = identity.rank, listener.settings
    if any(one == other or not {one, other} <= set(range(len(identity.addresses))) for one, other in pairs):
        raise ValueError(f"{purpose}: channels are between two different ranks, not {sorted(pairs)}")
    peers = sorted({peer for pair in pairs if rank in pair for peer in pair} - {rank})
    watch = LinksWatch(links, identity, settings.patience)
    ports = ChannelPorts(listener.address, peers, encrypted=listener.encrypted)
    listener.keep(ports)
    blobs = all_gather(ports.offers())
    header = identity.header(Kind.MESSAGE)
    streams_out: dict[int, tuple[StreamOut, Header]] = {}
    for peer in peers:
        try:
            offer = read_offers(blobs[peer], rank)
        except ValueError as error:
            watch.fail(ProtocolError, peer, f"{watch.name(peer)} sent {error}; do all ranks run the same macft?")
        stream = connect(identity.addresses[peer], offer, settings.piece_bytes, encrypted=listener.encrypted)
        if stream is None:
            at = ", ".join(str(port) for port, _ in offer)
            text = f"rank {rank} can't reach {watch.name(peer)} at port {at} for the {purpose}"
            watch.fail(PeerLost, peer, f"{text}; does its firewall let macft in?")
        listener.keep(stream)
        streams_out[peer] = stream, header
    streams_in = ports.accept(settings.piece_bytes, settings.timeout, lambda: watch.watch(purpose))
    ports.close()
    for peer in peers:
        if peer not in streams_in:
            text = f"{watch.name(peer)} did not connect to rank {rank} for the {purpose}"
            watch.fail(PeerTimeout, peer, f"{text} within {settings.timeout:g} s; does a firewall block it?")
    channels = StreamChannels(
        watch,
        streams_out,
        streams_in,
        purpose=purpose,
        generation=identity.generation,
        piece_bytes=settings.piece_bytes,
    )
    listener.keep(channels)
    return channels
