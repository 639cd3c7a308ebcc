"""The hosts of a run over SSH: what each has to be sent, and whether it is ready."""

from __future__ import annotations

import asyncio
import json
import posixpath
import shlex
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import asyncssh

from macft.diagnostics import software
from macft.errors import LaunchError
from macft.launch.remote_config import send_config
from macft.remote import host_probe
from macft.remote.connection import connect, python_command, raise_all
from macft.remote.host_probe import HostReport
from macft.remote.shipment import Shipment, changed, send
from macft.report.phase_lines import PhaseLines
from macft.topology.settings import TopologyConfig, split_host

_PROBE_SECONDS = 120.0
_MIN_FREE_BYTES = 200 * 2**20
_LOG_LINES = 5


@dataclass
class RemoteHost:
    """One host of the run.

    Attributes:
        rank: Its index in ``topology.hosts``.
        destination: ``[user@]name[:port]`` for SSH.
        name: The prefix of its lines in the terminal.
        connection: The open connection.
        last_lines: The last lines of its rank's output.
        process: The rank's agent, once started.
    """

    rank: int
    destination: str
    name: str
    connection: asyncssh.SSHClientConnection
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=_LOG_LINES))
    process: asyncssh.SSHClientProcess[str] | None = None


@dataclass(frozen=True)
class LaunchPlan:
    """What to run, and where.

    Attributes:
        topology: Of kind ``ssh``.
        config: The text of the run's ``config.yaml``, which a host writes once its checks have passed.
        own_config: The same with the paths of this machine, for ``folder``.
        folder: The run's folder on this machine, which gets the results.
        run_folder: The run's folder on the hosts, below ``topology.folder``.
        shipments: Files to send to all hosts first.
        has_code: Whether macft itself is among them, in ``code`` below ``topology.folder``.
        resume: Whether the ranks continue from the last checkpoint.
        replace: Whether a run that the hosts have in that folder is replaced.
        show: Prints a line.
        phases: Say what the launch waits for.
        secret: The key of this run, for the agents; empty without encryption.
        elastic: Whether the other ranks continue without a host that is lost.
    """

    topology: TopologyConfig
    config: str
    own_config: str
    folder: Path
    run_folder: str
    shipments: Sequence[Shipment]
    has_code: bool
    resume: bool
    replace: bool
    show: Callable[[str], None]
    phases: PhaseLines
    secret: bytes = field(default=b"", repr=False)
    elastic: bool = False


async def connect_all(topology: TopologyConfig, stack: AsyncExitStack) -> list[RemoteHost]:
    """Connects to all hosts at once; the connections are closed with ``stack``.

    Raises:
        LaunchError: one line for each host that can't be reached.
    """
    destinations = [topology.ssh_of(rank) for rank in range(len(topology.hosts))]
    results = await asyncio.gather(*(connect(item) for item in destinations), return_exceptions=True)
    connections = []
    for result in results:
        if isinstance(result, asyncssh.SSHClientConnection):
            connections.append(await stack.enter_async_context(result))
    raise_all(results)
    names = [destination.split("@")[-1] for destination in destinations]
    return [
        RemoteHost(
            rank, destinations[rank], names[rank] if names.count(names[rank]) == 1 else f"rank {rank}", connection
        )
        for rank, connection in enumerate(connections)
    ]


async def prepare_all(plan: LaunchPlan, hosts: list[RemoteHost]) -> None:
    """Examines all hosts, and sends each what it lacks.

    Raises:
        LaunchError: one line for each host that is not ready.
    """
    raise_all(await asyncio.gather(*(_prepare(plan, host) for host in hosts), return_exceptions=True))


async def _prepare(plan: LaunchPlan, host: RemoteHost) -> None:
    _, port = split_host(plan.topology.hosts[host.rank], plan.topology.port)
    paths = [shipment.destination for shipment in plan.shipments]
    ports = [port, port + 1, port + 2] if host.rank == 0 else [port + 1, port + 2]
    report = await _probe(host, plan.topology, paths, ports)
    if objection := _objection(plan, report):
        raise LaunchError(f"{host.destination}: {objection}")
    for shipment in plan.shipments:
        files = changed(shipment, report["files"].get(shipment.destination, {}))
        if files:
            plan.show(f"[{host.name}] {len(files)} files are sent to {shipment.destination}")
        try:
            await send(host.connection, shipment, files)
        except LaunchError as error:
            raise LaunchError(f"{host.destination}: {error}") from None
    try:
        remote = posixpath.join(plan.topology.folder, plan.run_folder)
        await send_config(host.connection, remote, plan.config, may_exist=plan.resume or plan.replace)
    except LaunchError as error:
        raise LaunchError(f"{host.destination}: {error}") from None


async def _probe(host: RemoteHost, topology: TopologyConfig, paths: Sequence[str], ports: Sequence[int]) -> HostReport:
    """Runs :mod:`macft.remote.host_probe` on a host.

    Args:
        host: The host.
        topology: The run's topology.
        paths: Files and folders to hash.
        ports: Ports that must be free.

    Raises:
        LaunchError: its Python cannot be run.
    """
    python = topology.python_of(host.rank)
    request = {
        "folder": topology.folder,
        "address": split_host(topology.hosts[host.rank], topology.port)[0].strip("[]"),
        "ports": list(ports),
        "packages": list(software.PACKAGES),
        "paths": list(paths),
    }
    source = Path(host_probe.__file__).read_text(encoding="utf-8")
    command = f"{python_command(python)} - {shlex.quote(json.dumps(request))}"
    try:
        completed = await asyncio.wait_for(host.connection.run(command, input=source), _PROBE_SECONDS)
    except (TimeoutError, asyncssh.Error) as error:
        raise LaunchError(f"{host.destination}: no answer from Python there ({error or 'too slow'})") from None
    lines = str(completed.stdout or "").strip().splitlines()
    try:
        answer = json.loads(lines[-1])
    except (IndexError, ValueError):
        reason = (str(completed.stderr or "").strip().splitlines() or [f"status {completed.exit_status}"])[-1]
        raise LaunchError(
            f"{host.destination}: '{python}' can't examine the host ({reason[:200]}); set topology.python to the "
            "Python that has macft"
        ) from None
    if not isinstance(answer, dict) or not isinstance(answer.get("versions"), dict):
        raise LaunchError(f"{host.destination}: '{python}' gave no valid answer")
    return cast(HostReport, answer)


def _objection(plan: LaunchPlan, report: HostReport) -> str:
    """Why a host is not ready; empty if it is."""
    ours, theirs = software.versions(), report["versions"]
    if "free" not in report:
        return f"has Python {theirs.get('python')}; macft needs 3.11 or newer: set topology.python"
    for package in software.PACKAGES:
        if package == "macft" and plan.has_code:
            continue
        if theirs.get(package) != ours[package]:
            return (
                f"has {package} {theirs.get(package)}, this machine has {ours[package]}; run there: "
                f"python3 -m pip install {package}=={ours[package]}"
            )
    for port, error in report["ports"].items():
        if error:
            return f"can't listen on port {port} ({error}); end what uses it, or set topology.port"
    needed = _MIN_FREE_BYTES + sum(
        path.stat().st_size
        for shipment in plan.shipments
        for path in changed(shipment, report["files"].get(shipment.destination, {})).values()
    )
    if report["free"] < needed:
        return (
            f"has {report['free'] / 2**20:.0f} MiB of disk free, {needed / 2**20:.0f} MiB are needed; remove old runs"
        )
    return ""
