"""Starts the other ranks of a cluster that answers, on this machine or over SSH, and meets them.

This process leads. What it starts ends with it: each of the others watches the connection that started it. With
``kind: hosts`` nothing is started: the user gives the command on each host, and that of the first one leads.
"""

from __future__ import annotations

import os
import platform
import secrets
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from typing import IO, Protocol

from macft.collective.base import Collective
from macft.collective.ring.security import KeyPair
from macft.collective.settings import CollectiveConfig
from macft.config.yaml import package_versions
from macft.device.blas import available_cores
from macft.errors import ConfigError
from macft.launch.generation.ssh_workers import SshWorkers
from macft.launch.generation.worker import WorkerRequest, elastic_ring
from macft.membership.join import MEMBERSHIP_PORT, MemberConfig, form_elastic_ring, local_address_towards
from macft.rendezvous.hosts import bind_addresses, connect_hosts
from macft.rendezvous.keystore import keyring_for, needs_keys, run_keyring
from macft.rendezvous.server import RendezvousServer
from macft.topology.hosts import own_rank
from macft.topology.settings import TopologyConfig, host_paths, split_host

_ANY_PORT_HERE = "127.0.0.1:0"
_END_SECONDS = 5.0
_LOG_LINES = 3
_WATCH_SECONDS = 0.2


class _Workers(Protocol):
    """The processes of the other ranks."""

    def problem(self) -> str | None:
        """Why one of them has ended; None if all run."""
        ...

    def end(self) -> None:
        """Ends those that run."""
        ...


@contextmanager
def generation_cluster(topology: TopologyConfig, settings: CollectiveConfig) -> Iterator[Collective]:
    """All ranks of ``topology``, of which this process is rank 0, or with ``kind: hosts`` that of its host.

    Raises:
        ConfigError: this machine is none of the hosts at which the command is to be given, or has no keys.
        LaunchError: a machine can't be reached, or a rank ended, with what it said last.
        RendezvousError, CollectiveError: the ranks do not come together.
    """
    if topology.kind == "hosts":
        with _met_on_hosts(topology, settings) as met:
            yield met
        return
    with ExitStack() as stack:
        requests = _local(topology, settings) if topology.kind == "local" else _on_hosts(topology, settings)
        leader = requests[0]
        keyring = run_keyring(bytes.fromhex(leader.secret)) if leader.secret else None
        server = RendezvousServer(
            leader.server,
            world_size=len(requests),
            run_id=leader.run_id,
            must_match=package_versions(),
            timeout=topology.start_timeout,
            names=[request.name for request in requests],
            keyring=keyring,
        )
        stack.callback(server.close)
        server.start()
        requests = [request.at(server.address) for request in requests]
        workers: _Workers
        if topology.kind == "local":
            workers = stack.enter_context(_LocalWorkers(requests[1:]))
        else:
            workers = SshWorkers(topology, requests[1:])
        stack.callback(workers.end)
        with _watched(server, workers):
            collective = elastic_ring(requests[0], stack)
        yield collective


@contextmanager
def _met_on_hosts(topology: TopologyConfig, settings: CollectiveConfig) -> Iterator[Collective]:
    """All hosts, on each of which the command was given."""
    name = topology.hosts[own_rank(topology)]
    keyring, must_match = keyring_for(topology, settings), package_versions()
    paths = host_paths(name, split_host(name, topology.port)[1])
    member = MemberConfig(
        bind=bind_addresses(paths, MEMBERSHIP_PORT),
        ring_bind=bind_addresses(paths, 1),
        name=name,
        settings=settings,
        keyring=keyring,
        must_match=must_match,
    )
    run_id = f"answers:{','.join(topology.hosts)}"
    with (
        connect_hosts(topology, settings, run_id=run_id, must_match=must_match, keyring=keyring) as ring,
        form_elastic_ring(ring, member) as collective,
    ):
        yield collective


@contextmanager
def _watched(server: RendezvousServer, workers: _Workers) -> Iterator[None]:
    """Inside, ranks that wait for one that has ended are told so at once."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_WATCH_SECONDS):
            if problem := workers.problem():
                server.give_up(problem)
                return

    thread = threading.Thread(target=watch, name="worker-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _local(topology: TopologyConfig, settings: CollectiveConfig) -> list[WorkerRequest]:
    run_id = secrets.token_hex(8)
    return [
        WorkerRequest(
            server=_ANY_PORT_HERE,
            rank=rank,
            world_size=topology.nodes,
            run_id=run_id,
            name=f"local-{rank}",
            bind=_ANY_PORT_HERE,
            member_bind=_ANY_PORT_HERE,
            ring_bind=_ANY_PORT_HERE,
            timeout=topology.start_timeout,
            secret="",
            machine_share=1 / topology.nodes,
            collective=asdict(settings),
        )
        for rank in range(topology.nodes)
    ]


def _on_hosts(topology: TopologyConfig, settings: CollectiveConfig) -> list[WorkerRequest]:
    """One for each host, this machine's first; it leads even if it is none of them."""
    try:
        own: int | None = own_rank(topology)
    except ConfigError:
        own = None
    hosts = topology.hosts
    if own is None:
        order = [local_address_towards(f"{split_host(hosts[0], topology.port)[0]}:1"), *hosts]
    else:
        order = [*hosts[own:], *hosts[:own]]  # neighbours stay neighbours
    here = order[0]
    address, port = split_host(here, topology.port)
    run_id = secrets.token_hex(8)
    secret = KeyPair.new().secret.hex() if needs_keys(topology, settings) else ""
    requests = []
    for rank, host in enumerate(order):
        paths = host_paths(host, topology.port)
        ring = bind_addresses(paths, 1)
        requests.append(
            WorkerRequest(
                server=f"{address}:{port}",
                rank=rank,
                world_size=len(order),
                run_id=run_id,
                name=host if host != here or own is not None else platform.node() or host,
                bind=ring,
                member_bind=bind_addresses(paths, MEMBERSHIP_PORT),
                ring_bind=ring,
                timeout=topology.start_timeout,
                secret=secret,
                machine_share=1.0,
                collective=asdict(settings),
            )
        )
    return requests


class _LocalWorkers:
    """Processes on this machine."""

    def __init__(self, requests: Sequence[WorkerRequest]):
        self._requests = requests
        self._logs: list[IO[bytes]] = []
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> _LocalWorkers:
        for request in self._requests:
            self._logs.append(tempfile.TemporaryFile())
            threads = max(1, available_cores() // request.world_size)
            worker = subprocess.Popen(
                [sys.executable, "-m", "macft.launch.generation.worker"],
                env={**os.environ, "OPENBLAS_NUM_THREADS": str(threads)},
                stdin=subprocess.PIPE,
                stdout=self._logs[-1],
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the leader only, which ends the others
            )
            self._processes.append(worker)
            assert worker.stdin is not None
            with suppress(BrokenPipeError):
                worker.stdin.write(request.to_line())
                worker.stdin.flush()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        for log in self._logs:
            log.close()

    def problem(self) -> str | None:
        for request, worker, log in zip(self._requests, self._processes, self._logs, strict=True):
            if worker.poll() is not None:
                log.seek(0)
                lines = log.read().decode(errors="replace").strip().splitlines()[-_LOG_LINES:]
                said = " | ".join(lines) or "no output"
                return f"{request.name} ended with status {worker.returncode}: {said}"
        return None

    def end(self) -> None:
        for worker in self._processes:
            assert worker.stdin is not None
            with suppress(BrokenPipeError):
                worker.stdin.close()  # it ends with that
        for worker in self._processes:
            try:
                worker.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
