"""Ports on this machine for a group of ranks."""

from __future__ import annotations

import contextlib
import socket


def free_addresses(count: int, host: str = "127.0.0.1") -> list[str]:
    """``host:port`` of ``count`` ports that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server((host, 0))) for _ in range(count)]
        return [f"{host}:{server.getsockname()[1]}" for server in servers]
