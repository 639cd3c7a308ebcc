"""Addresses on this machine."""

from __future__ import annotations

import socket

_held: list[socket.socket] = []


def closed_port() -> int:
    """A port of 127.0.0.1 on which nothing listens, and nothing will while the tests run."""
    holder = socket.socket()
    holder.bind(("127.0.0.1", 0))
    _held.append(holder)
    return int(holder.getsockname()[1])
