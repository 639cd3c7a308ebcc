"""Looks at a host before anything is started there. Its Python gets this over SSH: the standard library must do.

Reads one JSON request from its last argument and prints one JSON line: versions, disk, clock, ports, and the SHA-256 of
the files below the folders asked about.
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
from typing import Any


def versions(packages: list[str]) -> dict[str, str]:
    """{package: version}, with ``missing`` for one that is not installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def port_error(address: str, port: int) -> str:
    """Why ``address:port`` can't be listened on; empty if it can."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def manifest(path: Path) -> dict[str, str]:
    """{relative path: SHA-256} of the files below ``path``; of the file itself under an empty name."""
    if path.is_file():
        return {"": digest(path)}
    return {item.relative_to(path).as_posix(): digest(item) for item in path.rglob("*") if item.is_file()}


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What the request asks for."""
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
    if sys.version_info < (3, 11):  # noqa: UP036 - it is the host's Python, whichever that is
        print(json.dumps({"versions": {"python": platform.python_version()}}))
    else:
        print(json.dumps(answer(json.loads(sys.argv[-1]))))
