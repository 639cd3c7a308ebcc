"""Joins an ``mx.distributed`` group: at the addresses of macft's rendezvous, or as set up by mlx.launch or mpirun."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import mlx.core as mx

from macft.collective.mlx.collective import MlxCollective
from macft.collective.mlx.health import Health, HealthServer
from macft.collective.settings import CollectiveConfig
from macft.collective.wire import split_address
from macft.errors import CollectiveError

_LAUNCHERS = {
    "ring": ("MLX_HOSTFILE", "MLX_RANK"),
    "jaccl": ("MLX_IBV_DEVICES", "MLX_RANK"),
    "nccl": ("NCCL_HOST_IP", "MLX_RANK"),
    "mpi": ("OMPI_COMM_WORLD_RANK",),
}
"""The environment variables that each backend's launcher sets."""
_TRIES = 50
_WATCHDOG = """
import os, select, signal, sys
if not select.select([0], [], [], float(sys.argv[2]))[0]:
    print(sys.argv[3], file=sys.stderr, flush=True)
    os.kill(int(sys.argv[1]), signal.SIGKILL)
"""


class MlxListener:
    """This rank's two ports: that of its health server, at ``address``, and the next one for MLX.

    Args:
        bind: ``host:port`` of the health server; port 0 for two free ones. Of several paths only the first is used.
        settings: The configuration group ``collective``.

    Raises:
        CollectiveError: MLX has no such backend here, or the port is in use.
    """

    def __init__(self, bind: str, settings: CollectiveConfig):
        self.settings = settings
        self.backend = check_backend("ring" if settings.mlx_backend == "any" else settings.mlx_backend)
        if self.backend == "mpi":
            raise CollectiveError("collective.mlx_backend: mpi's ranks are started by mpirun, with topology=single")
        bind = bind.split("+", 1)[0]
        self._health = Health()
        self._collective: MlxCollective | None = None
        self._server = _listen_on_two_ports(bind, self._read)
        self.address = self._server.address

    def join(self, rank: int, addresses: Sequence[str], *, names: Sequence[str], secret: str) -> MlxCollective:
        """The collective of the ranks whose health servers are at ``addresses``; it then owns this listener's ports.

        Raises:
            CollectiveError: a rank does not answer, or MLX's group does not form.
        """
        self._health.rank, self._server.secret = rank, secret
        mlx_addresses = [f"{address.rpartition(':')[0]}:{split_address(address)[1] + 1}" for address in addresses]
        self._collective = MlxCollective(
            lambda: _initialize(self.backend, rank, mlx_addresses, self.settings.timeout),
            self._health,
            self._server,
            addresses,
            self.settings,
            names=names,
            secret=secret,
        )
        return self._collective

    def close(self) -> None:
        """Frees the ports. Only needed if ``join`` was not called."""
        self._server.close()

    def _read(self) -> Health:
        self._health.seconds = self._collective.seconds() if self._collective else 0.0
        return self._health


def is_launched() -> bool:
    """Whether this process was started by mlx.launch or mpirun as one of several ranks."""
    return any(all(name in os.environ for name in names) for names in _LAUNCHERS.values())


def join_launched(settings: CollectiveConfig) -> MlxCollective:
    """The collective of the processes that mlx.launch or mpirun has started.

    Raises:
        CollectiveError: MLX has no such backend here, or its group does not form.
    """
    backend = check_backend(settings.mlx_backend)
    health = Health()
    collective: MlxCollective | None = None

    def read() -> Health:
        health.seconds = collective.seconds() if collective else 0.0
        return health

    server = HealthServer(f"{_own_host()}:0", read)
    collective = MlxCollective(
        lambda: _init_with_watchdog(backend, settings.timeout), health, server, None, settings, secret="launched"
    )
    return collective


def check_backend(name: str) -> str:
    """``name``, if this machine's MLX has that backend; raises CollectiveError otherwise."""
    if name != "any" and not mx.distributed.is_available(name):
        available = [known for known in _LAUNCHERS if mx.distributed.is_available(known)]
        raise CollectiveError(
            f"collective.mlx_backend: this machine's MLX has no {name}; it has {', '.join(available)}"
        )
    return name


def _initialize(backend: str, rank: int, addresses: Sequence[str], timeout: float) -> mx.distributed.Group:
    """MLX's group of the ranks at ``addresses`` (``host:port``, by rank). MLX reads them from the environment only."""
    with tempfile.TemporaryDirectory(prefix="macft-mlx-") as folder:
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[address] for address in addresses]))
        host, port = split_address(addresses[0])
        variables: Mapping[str, str] = {
            "ring": {"MLX_HOSTFILE": str(hosts)},
            # MLX_IBV_DEVICES, the table of RDMA devices, is set by the user.
            "jaccl": {"MLX_JACCL_COORDINATOR": f"{host}:{port}"},
            "nccl": {"NCCL_HOST_IP": host, "NCCL_PORT": str(port), "MLX_WORLD_SIZE": str(len(addresses))},
        }[backend]
        os.environ |= {"MLX_RANK": str(rank), **variables}
        return _init_with_watchdog(backend, timeout)


def _init_with_watchdog(backend: str, timeout: float) -> mx.distributed.Group:
    """MLX's group. MLX holds the GIL while it waits for the others, so a second process enforces ``timeout``."""
    text = f"error: MLX's group did not form within {timeout:g} s; do all ranks run, and reach each other?"
    command = [sys.executable, "-S", "-E", "-c", _WATCHDOG, str(os.getpid()), str(timeout), text]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as watchdog:
        try:
            return mx.distributed.init(strict=True, backend=backend)
        finally:
            assert watchdog.stdin is not None
            watchdog.stdin.close()


def _listen_on_two_ports(bind: str, read: Callable[[], Health]) -> HealthServer:
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
    """This machine's address as the launcher knows it; otherwise that of its host name; otherwise loopback."""
    try:
        hosts = json.loads(Path(os.environ["MLX_HOSTFILE"]).read_text())
        return split_address(hosts[int(os.environ["MLX_RANK"])][0])[0]
    except (KeyError, OSError, ValueError, IndexError, TypeError):
        pass
    try:
        return str(socket.getaddrinfo(socket.gethostname(), 0, socket.AF_INET)[0][4][0])
    except OSError:
        return "127.0.0.1"
