"""Examines a host before a rank is started there. Its Python gets this file over SSH, so it uses the standard library.

Reads one JSON request from its last argument and prints one JSON line: versions, disk, clock, ports, and the SHA-256 of
the files below the requested folders.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import socket
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import TypedDict


class HostRequest(TypedDict):
    """What to examine: the run's folder, ports of an address, packages, and files or folders to hash."""

    folder: str
    address: str
    ports: list[int]
    packages: list[str]
    paths: list[str]


class HostReport(TypedDict):
    """The result.

    ``free`` are bytes, ``time`` is in seconds since 1970, ``ports`` maps a port to why it cannot be listened on (empty
    if it can), ``files`` maps a path to its :func:`manifest`. A Python older than 3.11 reports ``versions`` only.
    """

    versions: dict[str, str]
    free: int
    time: float
    ports: dict[str, str]
    files: dict[str, dict[str, str]]


def versions(packages: list[str]) -> dict[str, str]:
    """{package: version}, with ``missing`` for one that is not installed."""
    installed = {"python": platform.python_version()}
    for name in packages:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = "missing"
    return installed


def port_error(address: str, port: int) -> str:
    """Why ``address:port`` cannot be listened on; empty if it can."""
    try:
        family, kind, protocol, _, socket_address = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(socket_address)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def manifest(path: Path) -> dict[str, str]:
    """{relative path: SHA-256} of the files below ``path``; a file itself has an empty relative path."""
    if path.is_file():
        return {"": digest(path)}
    return {item.relative_to(path).as_posix(): digest(item) for item in path.rglob("*") if item.is_file()}


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def examine(request: HostRequest) -> HostReport:
    """Examines this host."""
    os.chdir(Path.home())
    Path(request["folder"]).mkdir(parents=True, exist_ok=True)
    return {
        "versions": versions(request["packages"]),
        "free": shutil.disk_usage(request["folder"]).free,
        "time": time.time(),
        "ports": {str(port): port_error(request["address"], port) for port in request["ports"]},
        "files": {path: manifest(Path(path)) for path in request["paths"]},
    }


if __name__ == "__main__":
    if sys.version_info < (3, 11):  # noqa: UP036 - the host's Python may be older
        print(json.dumps({"versions": {"python": platform.python_version()}}))
    else:
        print(json.dumps(examine(json.loads(sys.argv[-1]))))
