"""Starts all ranks of a run over SSH from one terminal, and stops them with it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import posixpath
import shlex
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import asyncssh

from macft.cli.run_command import INTERRUPTED, how_it_ended
from macft.diagnostics import software
from macft.errors import LaunchError, MacftError
from macft.launch.remote_config import fetch_results, own_config, send_config
from macft.remote import host_probe
from macft.remote.connection import connect, python_command
from macft.remote.host_probe import HostReport
from macft.remote.shipment import Shipment, changed, send
from macft.report.phase_lines import PhaseLines
from macft.topology.settings import TopologyConfig, split_host
from macft.training.stop_request import NODES_STOP, announce

_GRACE_SECONDS = 20.0
"""How long the other ranks may take to end after one has failed."""
_QUIT_SECONDS = 5.0
"""How long the ranks may take to quit before their connections are closed, with which they end."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PROBE_SECONDS = 120.0
_MIN_FREE_BYTES = 200 * 2**20
_LOG_LINES = 5
_log = logging.getLogger("macft.launch")


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


def launch_over_ssh(plan: LaunchPlan) -> int:
    """Runs all ranks and waits for them; returns rank 0's exit status.

    Once the ranks run, the first SIGINT, SIGTERM or SIGHUP asks all of them to stop cleanly, with a checkpoint. The
    second SIGINT or SIGTERM ends them.

    Raises:
        LaunchError: one line for each host that is not ready, before anything is started; or why a rank failed.
        KeyboardInterrupt: one of these signals came before the ranks ran.
    """
    try:
        return asyncio.run(_launch(plan))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


async def _launch(plan: LaunchPlan) -> int:
    task = asyncio.current_task()
    assert task is not None
    async with AsyncExitStack() as stack:
        with _on_signals(lambda _: task.cancel()):
            plan.phases.begin(f"connecting to {len(plan.topology.hosts)} hosts")
            hosts = await _connect_all(plan.topology, stack)
            plan.phases.begin(f"preparing {len(hosts)} hosts")
            await _prepare_all(plan, hosts)
            remote = posixpath.join(plan.topology.folder, plan.run_folder)
            before = [await _summary_time(host, remote) for host in hosts]
        connections = [host.connection for host in hosts]
        async with own_config(plan.folder, plan.own_config, plan.config, connections, remote):
            plan.phases.begin(f"starting {len(hosts)} nodes")
            status, completed = await _run(plan, hosts)
        if not completed:
            return status
        plan.phases.begin("fetching the results")
        source = await _holder_of_results(completed, before, remote)
        try:
            await fetch_results(source.connection, remote, plan.folder)
        except LaunchError as error:
            text = f"the results stay on {source.name}, in {remote}, and can't be copied to {plan.folder}: {error}"
            if status == 0:
                raise LaunchError(text) from None
            plan.show(f"note: {text}")
        return status


async def _holder_of_results(hosts: list[RemoteHost], before: list[float], remote: str) -> RemoteHost:
    """The host among those that completed the run that has written the newest summary since the times ``before``."""
    written = [(time, host) for host in hosts if (time := await _summary_time(host, remote)) > before[host.rank]]
    return max(written, key=lambda summary: summary[0], default=(0.0, hosts[0]))[1]


async def _summary_time(host: RemoteHost, remote: str) -> float:
    """When the host wrote its summary of the run, in whole seconds of its clock; 0 if it has none."""
    with contextlib.suppress(asyncssh.Error, OSError):
        async with host.connection.start_sftp_client() as sftp:
            return float((await sftp.stat(posixpath.join(remote, "summary.json"))).mtime or 0)
    return 0.0


async def _connect_all(topology: TopologyConfig, stack: AsyncExitStack) -> list[RemoteHost]:
    destinations = [topology.ssh_of(rank) for rank in range(len(topology.hosts))]
    results = await asyncio.gather(*(connect(item) for item in destinations), return_exceptions=True)
    connections = []
    for result in results:
        if isinstance(result, asyncssh.SSHClientConnection):
            connections.append(await stack.enter_async_context(result))
    _raise_all(results)
    names = [destination.split("@")[-1] for destination in destinations]
    return [
        RemoteHost(
            rank, destinations[rank], names[rank] if names.count(names[rank]) == 1 else f"rank {rank}", connection
        )
        for rank, connection in enumerate(connections)
    ]


def _raise_all(results: Sequence[object]) -> None:
    """Raises the errors among ``results`` as one, with a line for each host."""
    errors = [result for result in results if isinstance(result, BaseException)]
    for error in errors:
        if not isinstance(error, MacftError):
            raise error
    if errors:
        raise LaunchError("\n".join(str(error) for error in errors))


async def probe(host: RemoteHost, topology: TopologyConfig, paths: Sequence[str], ports: Sequence[int]) -> HostReport:
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


async def _prepare_all(plan: LaunchPlan, hosts: list[RemoteHost]) -> None:
    _raise_all(await asyncio.gather(*(_prepare(plan, host) for host in hosts), return_exceptions=True))


async def _prepare(plan: LaunchPlan, host: RemoteHost) -> None:
    _, port = split_host(plan.topology.hosts[host.rank], plan.topology.port)
    paths = [shipment.destination for shipment in plan.shipments]
    ports = [port, port + 1, port + 2] if host.rank == 0 else [port + 1, port + 2]
    report = await probe(host, plan.topology, paths, ports)
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


async def _start(plan: LaunchPlan, host: RemoteHost) -> None:
    python = python_command(plan.topology.python_of(host.rank))
    code = "PYTHONPATH=code " if plan.has_code else ""
    resume = " --resume" if plan.resume else ""
    folder, run = shlex.quote(plan.topology.folder), shlex.quote(plan.run_folder)
    # `env` and `exec` work in every login shell. The agent ends when its standard input does.
    command = f"cd {folder} && exec env {code}{python} -u -m macft.launch.agent {run} {host.rank}{resume}"
    host.process = await host.connection.create_process(command, stderr=asyncssh.STDOUT, errors="replace")
    if plan.secret:  # not in the command, which every user of the host can see
        host.process.stdin.write(f"key {plan.secret.hex()}\n")
    _log.info("rank %d started on %s", host.rank, host.destination)


async def _run(plan: LaunchPlan, hosts: list[RemoteHost]) -> tuple[int, list[RemoteHost]]:
    wishes = 0
    loop = asyncio.get_running_loop()

    def stop(number: int) -> None:
        nonlocal wishes
        if number == signal.SIGHUP and wishes:  # a closed terminal may send it twice
            return
        wishes += 1
        if wishes == 1:
            announce(NODES_STOP)
        _tell(hosts, "stop")
        if wishes == 2:
            loop.call_later(_QUIT_SECONDS, _abandon, hosts)

    with _on_signals(stop):
        try:
            await asyncio.gather(*(_start(plan, host) for host in hosts))
            return await _wait(plan, hosts)
        except LaunchError:
            if not wishes:
                raise
            return INTERRUPTED, []


@contextmanager
def _on_signals(call: Callable[[int], object]) -> Iterator[None]:
    """Calls ``call`` with each signal that means a wish to stop. SIGHUP stays ignored where it was (``nohup``)."""
    loop = asyncio.get_running_loop()
    signals = [each for each in _SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]
    for number in signals:
        loop.add_signal_handler(number, call, number)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


async def _wait(plan: LaunchPlan, hosts: list[RemoteHost]) -> tuple[int, list[RemoteHost]]:
    """The run's exit status, and the hosts whose rank ended with it."""
    tasks = {asyncio.create_task(_show_output(plan, host)): host for host in hosts}
    waiting = set(tasks)
    failed: tuple[RemoteHost, int | None] | None = None
    while waiting:
        done, waiting = await asyncio.wait(
            waiting,
            timeout=None if failed is None or plan.elastic else _GRACE_SECONDS,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if not done:
            _disconnect(hosts)
        for task in done:
            _log.info("rank %d on %s %s", tasks[task].rank, tasks[task].destination, _how(task.result()))
            if task.result() not in (0, INTERRUPTED):
                failed = failed or (tasks[task], task.result())
                if waiting:
                    plan.show(f"note: {tasks[task].name} {_how(task.result())}")
                _tell([tasks[each] for each in waiting], f"lost {tasks[task].name}")
    for status in (0, INTERRUPTED):  # a rank ends with 0 only if it knows that the results are on a disk
        if (failed is None or plan.elastic) and any(task.result() == status for task in tasks):
            return status, [host for task, host in tasks.items() if task.result() == status]
    assert failed is not None
    host, how = failed[0], _how(failed[1])
    raise LaunchError(f"{host.name} {how}; its last lines: {' | '.join(host.last_lines) or 'nothing'}")


def _how(status: int | None) -> str:
    return "lost its connection" if status is None else how_it_ended(status)


async def _show_output(plan: LaunchPlan, host: RemoteHost) -> int | None:
    """Shows a rank's output line by line, with the host's name.

    Returns its exit status, the negative number of the signal that ended it, or None if the connection broke.
    """
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
            plan.phases.end()
            plan.show(f"[{host.name}] {text}")
        completed = await host.process.wait()
    except (asyncssh.Error, OSError):
        return None
    return completed.returncode


def _tell(hosts: Sequence[RemoteHost], command: str) -> None:
    """Sends a command to the ranks; see :mod:`macft.launch.agent`."""
    for host in hosts:
        if host.process is not None and not host.process.stdin.is_closing():
            host.process.stdin.write(f"{command}\n")


def _disconnect(hosts: list[RemoteHost]) -> None:
    for host in hosts:
        if host.process is not None:
            host.process.stdin.write_eof() if not host.process.stdin.is_closing() else None


def _abandon(hosts: list[RemoteHost]) -> None:
    """Closes the connections; a rank that still runs notices, and ends by itself."""
    for host in hosts:
        host.connection.abort()


def show(line: str) -> None:
    """Prints a line to the terminal immediately; a terminal that was closed is no reason to fail."""
    try:
        print(line, flush=True, file=sys.stdout)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
