"""Starts all ranks of a run over SSH from one terminal, and stops them with it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import posixpath
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager

import asyncssh

from macft.cli.run_command import INTERRUPTED, how_it_ended
from macft.errors import LaunchError
from macft.launch.remote_config import fetch_results, own_config
from macft.launch.ssh_hosts import LaunchPlan, RemoteHost, connect_all, prepare_all
from macft.remote.connection import python_command
from macft.training.stop_request import NODES_STOP, announce

_GRACE_SECONDS = 20.0
"""How long the other ranks may take to end after one has failed."""
_QUIT_SECONDS = 5.0
"""How long the ranks may take to quit before their connections are closed, with which they end."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_log = logging.getLogger("macft.launch")


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
            hosts = await connect_all(plan.topology, stack)
            plan.phases.begin(f"preparing {len(hosts)} hosts")
            await prepare_all(plan, hosts)
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
        if host.process is not None and not host.process.stdin.is_closing():
            host.process.stdin.write_eof()


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
