"""Sends files to a host, only those whose SHA-256 differs there."""

from __future__ import annotations

import hashlib
import posixpath
from dataclasses import dataclass
from pathlib import Path

import asyncssh

from macft.errors import LaunchError

_SKIPPED = {"__pycache__", ".git", ".DS_Store"}


@dataclass(frozen=True)
class Shipment:
    """A file or folder of this machine, and its path on the host: absolute, or below the home folder."""

    source: Path
    destination: str

    def files(self) -> dict[str, Path]:
        """{path relative to the destination: file on this machine}; links are followed."""
        if self.source.is_file():
            return {"": self.source}
        return {
            path.relative_to(self.source).as_posix(): path
            for path in sorted(self.source.rglob("*"))
            if path.is_file() and not _SKIPPED & set(path.relative_to(self.source).parts)
        }


def changed(shipment: Shipment, on_host: dict[str, str]) -> dict[str, Path]:
    """The files that are missing on the host or differ there; ``on_host`` is {relative path: SHA-256}."""
    return {name: path for name, path in shipment.files().items() if on_host.get(name) != sha256(path)}


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


async def send(connection: asyncssh.SSHClientConnection, shipment: Shipment, files: dict[str, Path]) -> int:
    """Copies ``files`` to the host, each atomically; returns the number of bytes.

    Raises:
        LaunchError: the host cannot store them.
    """
    total = 0
    try:
        async with connection.start_sftp_client() as sftp:
            for name, path in files.items():
                target = posixpath.join(shipment.destination, name) if name else shipment.destination
                await sftp.makedirs(posixpath.dirname(target) or ".", exist_ok=True)
                partial = f"{target}.partial"
                await sftp.put(str(path), partial)
                await sftp.posix_rename(partial, target)
                total += path.stat().st_size
    except (asyncssh.SFTPError, asyncssh.ChannelOpenError) as error:
        raise LaunchError(f"can't store {shipment.destination}: {error}") from None
    return total


async def fetch(connection: asyncssh.SSHClientConnection, source: str, destination: Path, *, without: str) -> None:
    """Copies the folder ``source`` on the host over the folder ``destination``, but for the file ``without`` in it.

    Raises:
        LaunchError: it cannot be read there or stored here.
    """
    destination.mkdir(parents=True, exist_ok=True)
    try:
        async with connection.start_sftp_client() as sftp:
            names = map(str, await sftp.listdir(source))
            wanted = [name for name in names if name != without and not name.startswith(".")]
            paths = [posixpath.join(source, name) for name in wanted]  # no pattern: a folder's name may look like one
            await sftp.get(paths, str(destination), recurse=True, preserve=True)
    except (asyncssh.SFTPError, asyncssh.ChannelOpenError, OSError) as error:
        raise LaunchError(f"can't fetch {source}: {error}") from None
