"""Free ports of this machine for a group of ranks."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import socket
import tempfile
from functools import cache
from pathlib import Path

_TRIES = 1000
# Below the ephemeral ports (Linux from 32768, macOS from 49152), so that the system does not assign one meanwhile.
_FIRST, _LAST = 20_000, 32_000


def free_addresses(count: int, host: str = "127.0.0.1", *, in_a_row: int = 2) -> list[str]:
    """``count`` addresses ``host:port``, each the first of ``in_a_row`` consecutive ports that were just free.

    They are reserved until this process ends: no other process of this user gets them here before they are used.

    Raises:
        OSError: there are too few free ports, or the file of reservations can't be written.
    """
    addresses: list[str] = []
    with contextlib.ExitStack() as held:
        for _ in range(_TRIES):
            if len(addresses) == count:
                return addresses
            port = _FIRST + secrets.randbelow(_LAST - _FIRST)
            with contextlib.ExitStack() as row, contextlib.suppress(OSError):
                for offset in range(in_a_row):
                    fcntl.lockf(_reservations(os.getpid()), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port + offset)
                    row.enter_context(socket.create_server((host, port + offset)))
                held.push(row.pop_all())
                addresses.append(f"{host}:{port}")
    raise OSError(f"{host} has no {in_a_row} free ports in a row {count} times")


@cache
def _reservations(process_id: int) -> int:  # noqa: ARG001  (a fork has no locks of its own yet)
    """The open file of which a process locks one byte for each port. Never closed, for that would unlock them."""
    path = Path(tempfile.gettempdir()) / f"macft-ports-{os.getuid()}"
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
