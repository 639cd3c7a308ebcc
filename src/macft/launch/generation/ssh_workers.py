"""Ranks of a cluster that answers, started on other machines over SSH."""

from __future__ import annotations

import asyncio
import shlex
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import asyncssh

from macft.launch.generation.worker import WorkerRequest
from macft.remote.connection import connect, python_command, raise_all
from macft.topology.settings import TopologyConfig

_LOG_LINES = 3
_END_SECONDS = 5.0


@dataclass
class _Remote:
    """A rank's process on its host, and the last lines that it wrote."""

    name: str
    connection: asyncssh.SSHClientConnection
    process: asyncssh.SSHClientProcess[str]
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=_LOG_LINES))
    has_ended: bool = False


class SshWorkers:
    """Starts a rank for each of ``requests``, whose names are hosts of ``topology``. Connections live in a thread.

    Raises:
        LaunchError: one line for each host that can't be reached.
    """

    def __init__(self, topology: TopologyConfig, requests: Sequence[WorkerRequest]):
        self._topology = topology
        self._remotes: list[_Remote] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ssh", daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._start_all(requests), self._loop).result()
        except BaseException:
            self.end()
            raise

    def problem(self) -> str | None:
        """Why a rank has ended; None if all run."""
        for remote in self._remotes:
            if remote.has_ended:
                return f"{remote.name} ended: {' | '.join(remote.lines) or 'the connection broke'}"
        return None

    def end(self) -> None:
        """Ends the ranks and the connections."""
        if self._loop.is_running():
            asyncio.run_coroutine_threadsafe(self._end_all(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _start_all(self, requests: Sequence[WorkerRequest]) -> None:
        started = await asyncio.gather(*map(self._start, requests), return_exceptions=True)
        self._remotes = [each for each in started if isinstance(each, _Remote)]
        raise_all(started)

    async def _start(self, request: WorkerRequest) -> _Remote:
        rank = self._topology.hosts.index(request.name)
        connection = await connect(self._topology.ssh_of(rank))
        folder, python = shlex.quote(self._topology.folder), python_command(self._topology.python_of(rank))
        # Commands that work in every login shell.
        command = f"mkdir -p {folder} && cd {folder} && exec {python} -u -m macft.launch.generation.worker"
        process = await connection.create_process(command, stderr=asyncssh.STDOUT, errors="replace")
        process.stdin.write(request.to_line().decode())
        remote = _Remote(request.name, connection, process)
        self._loop.create_task(_listen(remote))
        return remote

    async def _end_all(self) -> None:
        for remote in self._remotes:
            with suppress(OSError, asyncssh.Error):
                remote.process.stdin.write_eof()
        for remote in self._remotes:
            with suppress(OSError, asyncssh.Error, TimeoutError):
                await asyncio.wait_for(remote.process.wait(), _END_SECONDS)
            remote.connection.close()
            with suppress(OSError, asyncssh.Error):
                await remote.connection.wait_closed()


async def _listen(remote: _Remote) -> None:
    """Keeps the last lines of a rank's output until it ends."""
    with suppress(OSError, asyncssh.Error, asyncio.IncompleteReadError):
        async for line in remote.process.stdout:
            remote.lines.append(line.rstrip("\r\n"))
    remote.has_ended = True
