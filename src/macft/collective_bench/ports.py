"""Ports on this machine for a group of ranks."""

from __future__ import annotations

import contextlib
import secrets
import socket

_TRIES = 1000
# Below those that systems hand out themselves (Linux from 32768, macOS from 49152), so nobody is given one meanwhile.
_FIRST, _LAST = 20_000, 32_000


def free_addresses(count: int, host: str = "127.0.0.1", *, in_a_row: int = 2) -> list[str]:
    """``host:port`` of ``count`` ports that were free a moment ago, and so were the next ones, ``in_a_row`` each.

    Raises:
        OSError: there are not so many.
    """
    found: list[str] = []
    with contextlib.ExitStack() as held:
        for _ in range(_TRIES):
            if len(found) == count:
                return found
            port = _FIRST + secrets.randbelow(_LAST - _FIRST)
            with contextlib.ExitStack() as row, contextlib.suppress(OSError):
                for after in range(in_a_row):
                    row.enter_context(socket.create_server((host, port + after)))
                held.push(row.pop_all())
                found.append(f"{host}:{port}")
    raise OSError(f"{host} has no {in_a_row} free ports in a row {count} times")
