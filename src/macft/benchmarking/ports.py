"""Ports on this machine for a group of ranks."""

from __future__ import annotations

import contextlib
import socket

_TRIES = 200


def free_addresses(count: int, host: str = "127.0.0.1") -> list[str]:
    """``host:port`` of ``count`` ports that were free a moment ago, and so was the next port of each.

    Raises:
        OSError: there are not so many.
    """
    found: list[str] = []
    with contextlib.ExitStack() as stack:
        for _ in range(_TRIES):
            if len(found) == count:
                return found
            port = stack.enter_context(socket.create_server((host, 0))).getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                stack.enter_context(socket.create_server((host, port + 1)))
                found.append(f"{host}:{port}")
    raise OSError(f"{host} has no {count} pairs of free ports")
