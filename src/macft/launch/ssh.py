"""Starts every node of a run from one terminal over SSH, and ends them all with it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import posixpath
import shlex
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncssh

from macft.diagnostics import software
from macft.errors import LaunchError, MacftError
from macft.remote import host_probe
from macft.remote.shipment import Shipment, changed, fetch, send
from macft.remote.ssh import connect, python_command
from macft.topology.settings import TopologyConfig, split_host

_GRACE_SECONDS = 20.0
"""How long the other ranks may take to end by themselves once one has failed."""
_PROBE_SECONDS = 120.0
_MIN_FREE_BYTES = 200 * 2**20
_LOG_LINES = 5


@dataclass
class RemoteHost:
    """One host of the run.

    Attributes:
        rank: Its place in ``topology.hosts``.
        destination: Where SSH finds it.
        name: What its lines in the terminal begin with.
    """

    rank: int
    destination: str
    name: str
    connection: asyncssh.SSHClientConnection
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=_LOG_LINES))
    process: asyncssh.SSHClientProcess[str] | None = None


@dataclass(frozen=True)
class LaunchPlan:
    """What is to run.

    Attributes:
        topology: Kind ``ssh``.
        config: Text of the run's ``config.yaml``.
        run_folder: The run's folder on the hosts, below ``topology.folder``; results come back to ``folder`` here.
        shipments: To be sent to all hosts first.
        has_code: Whether macft itself is among them, in ``code`` below ``topology.folder``.
        show: Prints a line.
        secret: Key of this run, for the agents; empty where it is not encrypted.
        elastic: Whether the others go on without a host that is lost.
    """

    topology: TopologyConfig
    config: str
    folder: Path
    run_folder: str
    shipments: Sequence[Shipment]
    has_code: bool
    resume: bool
    show: Callable[[str], None]
    secret: bytes = field(default=b"", repr=False)
    elastic: bool = False


def launch(plan: LaunchPlan) -> int:
    """Runs all ranks and waits for them; returns rank 0's exit status.

    The first SIGINT or SIGTERM asks rank 0 for an orderly end with a checkpoint; a second one cuts all hosts off, which
    makes each of them stop by itself.

    Raises:
        LaunchError: one line for each host that is not fit, before anything is started; or why a rank failed.
    """
    return asyncio.run(_launch(plan))


async def _launch(plan: LaunchPlan) -> int:
    async with AsyncExitStack() as stack:
        hosts = await _connect_all(plan.topology, stack)
        await _prepare_all(plan, hosts)
        await asyncio.gather(*(_start(plan, host) for host in hosts))
        status, completed = await _run(plan, hosts)
        remote = posixpath.join(plan.topology.folder, plan.run_folder)
        source = await _holder_of_results(completed, remote)
        try:
            await fetch(source.connection, remote, plan.folder)
        except LaunchError as error:
            plan.show(f"note: the results stay on {source.name}: {error}")
        return status


async def _holder_of_results(hosts: list[RemoteHost], remote: str) -> RemoteHost:
    """The host that led at the end: it has written the newest summary."""
    written = []
    for host in hosts[: None if len(hosts) > 1 else 0]:
        with contextlib.suppress(asyncssh.Error, OSError):
            async with host.connection.start_sftp_client() as sftp:
                found = await sftp.stat(posixpath.join(remote, "summary.json"))
                written.append((found.mtime or 0, host))
    return max(written, key=lambda item: item[0], default=(0, hosts[0]))[1]


async def _connect_all(topology: TopologyConfig, stack: AsyncExitStack) -> list[RemoteHost]:
    destinations = [topology.ssh_of(rank) for rank in range(len(topology.hosts))]
    found = await asyncio.gather(*(connect(item) for item in destinations), return_exceptions=True)
    connections = []
    for item in found:
        if isinstance(item, asyncssh.SSHClientConnection):
            connections.append(await stack.enter_async_context(item))
    _raise_all(found)
    names = [destination.split("@")[-1] for destination in destinations]
    return [
        RemoteHost(
            rank, destinations[rank], names[rank] if names.count(names[rank]) == 1 else f"rank {rank}", connection
        )
        for rank, connection in enumerate(connections)
    ]


def _raise_all(results: Sequence[Any]) -> None:
    """Raises what went wrong, one line for each host."""
    errors = [result for result in results if isinstance(result, BaseException)]
    for error in errors:
        if not isinstance(error, MacftError):
            raise error
    if errors:
        raise LaunchError("\n".join(str(error) for error in errors))


async def probe(
    host: RemoteHost, topology: TopologyConfig, paths: Sequence[str], ports: Sequence[int]
) -> dict[str, Any]:
    """What :mod:`macft.remote.host_probe` finds on a host.

    Raises:
        LaunchError: its Python can't be run.
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
        done = await asyncio.wait_for(host.connection.run(command, input=source), _PROBE_SECONDS)
    except (TimeoutError, asyncssh.Error) as error:
        raise LaunchError(f"{host.destination}: no answer from Python there ({error or 'too slow'})") from None
    lines = str(done.stdout or "").strip().splitlines()
    try:
        answer = json.loads(lines[-1])
    except (IndexError, ValueError):
        said = (str(done.stderr or "").strip().splitlines() or [f"status {done.exit_status}"])[-1]
        raise LaunchError(
            f"{host.destination}: '{python}' can't look at the host there ({said[:200]}); set topology.python to the "
            "Python that has macft"
        ) from None
    if not isinstance(answer, dict) or not isinstance(answer.get("versions"), dict):
        raise LaunchError(f"{host.destination}: '{python}' gave no proper answer")
    return answer


async def _prepare_all(plan: LaunchPlan, hosts: list[RemoteHost]) -> None:
    _raise_all(await asyncio.gather(*(_prepare(plan, host) for host in hosts), return_exceptions=True))


async def _prepare(plan: LaunchPlan, host: RemoteHost) -> None:
    _, port = split_host(plan.topology.hosts[host.rank], plan.topology.port)
    paths = [shipment.destination for shipment in plan.shipments]
    ports = [port, port + 1, port + 2] if host.rank == 0 else [port + 1, port + 2]
    answer = await probe(host, plan.topology, paths, ports)
    if objection := _objection(plan, answer):
        raise LaunchError(f"{host.destination}: {objection}")
    for shipment in plan.shipments:
        files = changed(shipment, answer["files"].get(shipment.destination, {}))
        if files:
            plan.show(f"[{host.name}] {len(files)} files are sent to {shipment.destination}")
        try:
            await send(host.connection, shipment, files)
        except LaunchError as error:
            raise LaunchError(f"{host.destination}: {error}") from None
    await _send_config(plan, host)


def _objection(plan: LaunchPlan, answer: dict[str, Any]) -> str:
    """Why a host is not fit, or nothing."""
    ours, theirs = software.versions(), answer["versions"]
    if "free" not in answer:
        return f"has Python {theirs.get('python')}; macft needs 3.11 or newer: set topology.python"
    for package in software.PACKAGES:
        if package == "macft" and plan.has_code:
            continue
        if theirs.get(package) != ours[package]:
            return (
                f"has {package} {theirs.get(package)}, this machine has {ours[package]}; run there: "
                f"python3 -m pip install {package}=={ours[package]}"
            )
    for port, error in answer["ports"].items():
        if error:
            return f"can't listen on port {port} ({error}); end what uses it, or set topology.port"
    needed = _MIN_FREE_BYTES + sum(
        path.stat().st_size
        for shipment in plan.shipments
        for path in changed(shipment, answer["files"].get(shipment.destination, {})).values()
    )
    if answer["free"] < needed:
        return (
            f"has {answer['free'] / 2**20:.0f} MiB of disk free, {needed / 2**20:.0f} MiB are needed; remove old runs"
        )
    return ""


async def _send_config(plan: LaunchPlan, host: RemoteHost) -> None:
    folder = posixpath.join(plan.topology.folder, plan.run_folder)
    try:
        async with host.connection.start_sftp_client() as sftp:
            await sftp.makedirs(folder, exist_ok=True)
            async with sftp.open(posixpath.join(folder, "config.yaml"), "w", encoding="utf-8") as file:
                await file.write(plan.config)
    except (asyncssh.SFTPError, asyncssh.ChannelOpenError) as error:
        raise LaunchError(f"{host.destination}: can't store the run's configuration in {folder}: {error}") from None


async def _start(plan: LaunchPlan, host: RemoteHost) -> None:
    python = python_command(plan.topology.python_of(host.rank))
    code = "PYTHONPATH=code " if plan.has_code else ""
    resume = " --resume" if plan.resume else ""
    folder, run = shlex.quote(plan.topology.folder), shlex.quote(plan.run_folder)
    # `env` and `exec` work in every login shell; the agent ends when its standard input does.
    command = f"cd {folder} && exec env {code}{python} -u -m macft.launch.agent {run} {host.rank}{resume}"
    host.process = await host.connection.create_process(command, stderr=asyncssh.STDOUT, errors="replace")
    if plan.secret:  # not in the command, which every user of the host can see
        host.process.stdin.write(f"key {plan.secret.hex()}\n")


async def _run(plan: LaunchPlan, hosts: list[RemoteHost]) -> tuple[int, list[RemoteHost]]:
    asked = 0

    def stop() -> None:
        nonlocal asked
        asked += 1
        running = [host.process for host in hosts if host.process is not None and host.process.exit_status is None]
        first = next((process for process in running if not process.stdin.is_closing()), None)
        if asked == 1 and first is not None:
            plan.show("stopping: the run ends after this step, with a checkpoint; Ctrl-C again to cut it off")
            first.stdin.write("stop\n")
        else:
            _cut_off(hosts)

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        return await _wait(plan, hosts)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def _wait(plan: LaunchPlan, hosts: list[RemoteHost]) -> tuple[int, list[RemoteHost]]:
    """How the run ended, and the hosts on which it ended so."""
    tasks = {asyncio.create_task(_follow(plan, host)): host for host in hosts}
    waiting = set(tasks)
    failed: tuple[RemoteHost, int] | None = None
    while waiting:
        done, waiting = await asyncio.wait(
            waiting,
            timeout=None if failed is None or plan.elastic else _GRACE_SECONDS,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if not done:
            _cut_off(hosts)
        for task in done:
            if task.result() not in (0, 130):
                failed = failed or (tasks[task], task.result())
                if plan.elastic and waiting:
                    plan.show(f"note: {tasks[task].name} {_how(task.result())}")
    for status in (0, 130):
        if (failed is None or plan.elastic) and any(task.result() == status for task in tasks):
            return status, [host for task, host in tasks.items() if task.result() == status]
    assert failed is not None
    host, how = failed[0], _how(failed[1])
    raise LaunchError(f"{host.name} {how}; it said last: {' | '.join(host.last_lines) or 'nothing'}")


def _how(status: int) -> str:
    return "lost its connection" if status < 0 else f"ended with status {status}"


async def _follow(plan: LaunchPlan, host: RemoteHost) -> int:
    """Shows a rank's output line by line, with the host's name; returns its exit status, -1 if the connection broke."""
    assert host.process is not None
    try:
        while True:
            try:
                line = await host.process.stdout.readuntil("\n")
            except asyncio.IncompleteReadError as error:
                line = str(error.partial)
            if not line:
                break
            text = line.rstrip("\r\n")
            host.last_lines.append(text)
            plan.show(f"[{host.name}] {text}")
        done = await host.process.wait()
    except (asyncssh.Error, OSError):
        return -1
    return -1 if done.exit_status is None else done.exit_status


def _cut_off(hosts: list[RemoteHost]) -> None:
    for host in hosts:
        if host.process is not None:
            host.process.stdin.write_eof() if not host.process.stdin.is_closing() else None


def show(line: str) -> None:
    """Prints to the terminal at once."""
    print(line, flush=True, file=sys.stdout)
