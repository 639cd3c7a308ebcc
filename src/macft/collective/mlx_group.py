"""Joins a group of MLX's: at the addresses of macft's own rendezvous, or as ``mlx.launch`` or mpirun has arranged."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from macft.collective.health import Health, HealthServer
from macft.collective.mlx_backend import MlxCollective
from macft.collective.settings import CollectiveConfig
from macft.collective.wire import split_address
from macft.errors import CollectiveError

_LAUNCHERS = {
    "ring": ("MLX_HOSTFILE", "MLX_RANK"),
    "jaccl": ("MLX_IBV_DEVICES", "MLX_RANK"),
    "nccl": ("NCCL_HOST_IP", "MLX_RANK"),
    "mpi": ("OMPI_COMM_WORLD_RANK",),
}
"""What each backend's launcher leaves in the environment."""
_TRIES = 50
_GUARD = """
import os, select, signal, sys
if not select.select([0], [], [], float(sys.argv[2]))[0]:
    print(sys.argv[3], file=sys.stderr, flush=True)
    os.kill(int(sys.argv[1]), signal.SIGKILL)
"""


class MlxListener:
    """This rank's two ports: that of its pulse, whose ``address`` the others are told, and the next one for MLX.

    Args:
        bind: ``host:port`` of the pulse; port 0 for two free ones. Of several paths only the first is used.
        settings: The group ``collective``.

    Raises:
        CollectiveError: MLX has no such backend here, or the port is in use.
    """

    def __init__(self, bind: str, settings: CollectiveConfig):
        self.settings = settings
        self.backend = check_backend("ring" if settings.mlx_backend == "any" else settings.mlx_backend)
        if self.backend == "mpi":
            raise CollectiveError("collective.mlx_backend: mpi's ranks are started by mpirun, with topology=single")
        bind = bind.split("+", 1)[0]
        self._state = Health()
        self._joined: MlxCollective | None = None
        self._pulse = _two_ports(bind, self._read)
        self.address = self._pulse.address

    def join(self, rank: int, addresses: Sequence[str], *, names: Sequence[str], secret: str) -> MlxCollective:
        """The collective of the ranks whose pulses are at ``addresses``; this listener is then its.

        Raises:
            CollectiveError: a rank does not answer, or MLX's group does not come together.
        """
        self._state.rank, self._pulse.secret = rank, secret
        places = [f"{address.rpartition(':')[0]}:{split_address(address)[1] + 1}" for address in addresses]
        self._joined = MlxCollective(
            lambda: _initialize(self.backend, rank, places, self.settings.timeout),
            self._state,
            self._pulse,
            addresses,
            self.settings,
            names=names,
            secret=secret,
        )
        return self._joined

    def close(self) -> None:
        """Frees the ports; for a listener that was not joined."""
        self._pulse.close()

    def _read(self) -> Health:
        self._state.seconds = self._joined.seconds() if self._joined else 0.0
        return self._state


def launched() -> bool:
    """Whether this process was started by mlx.launch or mpirun as one of several ranks."""
    return any(all(name in os.environ for name in names) for names in _LAUNCHERS.values())


def join_launched(settings: CollectiveConfig) -> MlxCollective:
    """The collective of the processes that mlx.launch or mpirun has started.

    Raises:
        CollectiveError: MLX has no such backend here, or its group does not come together.
    """
    backend = check_backend(settings.mlx_backend)
    state = Health()
    made: list[MlxCollective] = []

    def read() -> Health:
        state.seconds = made[0].seconds() if made else 0.0
        return state

    pulse = HealthServer(f"{_own_host()}:0", read)
    made.append(
        MlxCollective(lambda: _guarded(backend, settings.timeout), state, pulse, None, settings, secret="launched")
    )
    return made[0]


def check_backend(name: str) -> str:
    """``name``, if this machine's MLX has that backend; raises CollectiveError otherwise."""
    if name != "any" and not mx.distributed.is_available(name):
        there = [known for known in _LAUNCHERS if mx.distributed.is_available(known)]
        raise CollectiveError(f"collective.mlx_backend: this machine's MLX has no {name}; it has {', '.join(there)}")
    return name


def _initialize(backend: str, rank: int, places: Sequence[str], timeout: float) -> Any:
    """Tells MLX through the environment, its only way, who is where; ``places`` are ``host:port`` by rank."""
    with tempfile.TemporaryDirectory(prefix="macft-mlx-") as folder:
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[place] for place in places]))
        host, port = split_address(places[0])
        told: Mapping[str, str] = {
            "ring": {"MLX_HOSTFILE": str(hosts)},
            # MLX_IBV_DEVICES, the table of RDMA devices, is the user's to give.
            "jaccl": {"MLX_JACCL_COORDINATOR": f"{host}:{port}"},
            "nccl": {"NCCL_HOST_IP": host, "NCCL_PORT": str(port), "MLX_WORLD_SIZE": str(len(places))},
        }[backend]
        os.environ |= {"MLX_RANK": str(rank), **told}
        return _guarded(backend, timeout)


def _guarded(backend: str, timeout: float) -> Any:
    """MLX's group. MLX holds Python's lock while it waits for the others, so a second process ends this one in time."""
    text = f"error: MLX's group did not come together within {timeout:g} s; do all ranks run, and reach each other?"
    command = [sys.executable, "-S", "-E", "-c", _GUARD, str(os.getpid()), str(timeout), text]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as guard:
        try:
            return mx.distributed.init(strict=True, backend=backend)
        finally:
            assert guard.stdin is not None
            guard.stdin.close()


def _two_ports(bind: str, read: Callable[[], Health]) -> HealthServer:
    host, port = split_address(bind)
    for _ in range(_TRIES):
        server = HealthServer(bind, read)
        try:
            with socket.create_server((host, split_address(server.address)[1] + 1)):
                return server
        except (OSError, OverflowError) as error:
            server.close()
            if port:
                raise CollectiveError(f"can't listen on {host}:{port + 1}, where MLX's ring would: {error}") from None
    raise CollectiveError(f"no two free ports in a row at {host}")


def _own_host() -> str:
    """The address under which the launcher knows this machine; else its name's; else loopback."""
    try:
        hosts = json.loads(Path(os.environ["MLX_HOSTFILE"]).read_text())
        return split_address(hosts[int(os.environ["MLX_RANK"])][0])[0]
    except (KeyError, OSError, ValueError, IndexError, TypeError):
        pass
    try:
        return str(socket.getaddrinfo(socket.gethostname(), 0, socket.AF_INET)[0][4][0])
    except OSError:
        return "127.0.0.1"
