"""Several nodes as processes on this machine: starts them, passes Ctrl-C on, leaves none behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from macft.device.blas import available_cores
from macft.errors import MacftError
from macft.rendezvous.keystore import Keyring
from macft.rendezvous.rendezvous import RendezvousServer

_GRACE_SECONDS = 20.0
"""How long the other ranks may take to end by themselves once one has failed."""
_LOG_LINES = 5


class RankFailed(MacftError):
    """A rank's process ended with an error of its own."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def launch(
    world_size: int,
    folder: Path,
    *,
    run_id: str,
    fingerprint: str,
    start_timeout: float,
    resume: bool,
    keyring: Keyring | None = None,
    elastic: bool = False,
    restart: bool = False,
) -> int:
    """Runs ``world_size`` ranks of the run in ``folder`` and waits for them; returns rank 0's exit status.

    Rank 0 has this terminal; the others write to ``folder/logs/rank-N.log``. SIGINT and SIGTERM are passed on once to
    rank 0, which ends the whole run in order. The ranks watch their standard input: if this process dies, they stop.

    ``elastic``: the others go on without a rank that dies; the one that then leads is shown here, and takes the
    signals. ``restart``: a rank that was killed is started again, and joins.

    Raises:
        RankFailed: a rank other than 0 failed; the message holds the last lines of its log.
    """
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    threads = max(1, available_cores() // world_size)
    server = RendezvousServer(
        "127.0.0.1:0",
        world_size=world_size,
        run_id=run_id,
        fingerprint=fingerprint,
        timeout=start_timeout,
        keyring=keyring,
    )
    processes: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)  # the others learn of it from this one
                return

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.start()
        for rank in range(world_size):
            command = [sys.executable, "-m", "macft.launch.worker", str(folder), str(rank), server.address, run_id]
            processes.append(_start([*command, *(["--resume"] if resume else [])], rank, logs, threads))
        again = _Again(folder, logs, threads) if restart else None
        return _wait_elastic(processes, logs, again) if elastic else _wait(processes, logs)
    finally:
        for process in processes:
            _end(process)
        server.close()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _start(command: list[str], rank: int, logs: Path, threads: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": str(threads)}
    # A session of its own: Ctrl-C in the terminal reaches the launcher alone, which passes it on exactly once.
    arguments: dict[str, Any] = {"env": environment, "stdin": subprocess.PIPE, "start_new_session": True}
    if rank == 0:
        return subprocess.Popen(command, **arguments)
    with (logs / f"rank-{rank}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, **arguments)


def _wait(processes: list[subprocess.Popen[bytes]], logs: Path) -> int:
    """Waits for all ranks; once one has failed the others get a moment to report it, then are ended."""
    failed: int | None = None
    deadline = float("inf")
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        for rank, process in enumerate(processes):
            if failed is None and process.poll() not in (None, 0, 130):
                failed, deadline = rank, time.monotonic() + _GRACE_SECONDS
        time.sleep(0.05)
    for process in processes:
        _end(process)
    first = processes[0].returncode
    if failed is None or failed == 0:
        return first if first >= 0 else 128 - first
    code = processes[failed].returncode
    how = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
    raise RankFailed(f"rank {failed} {how}; {_tail(logs / f'rank-{failed}.log')}", 1)


class _Again:
    """Starts ranks again."""

    def __init__(self, folder: Path, logs: Path, threads: int):
        self._folder, self._logs, self._threads = folder, logs, threads

    def __call__(self, rank: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "macft.launch.worker", str(self._folder), str(rank), "-", "-", "--join"]
        return _start(command, rank, self._logs, self._threads)


def _wait_elastic(processes: list[subprocess.Popen[bytes]], logs: Path, again: _Again | None) -> int:
    """Waits for all ranks, and shows the log of the one that leads once rank 0 is gone; returns how the run ended."""
    shown: dict[int, int] = {}
    ended: dict[int, int] = {}
    while any(process.poll() is None for process in processes):
        for rank, process in enumerate(processes):
            if rank in ended or (code := process.poll()) is None:
                continue
            goes_on = 0 not in ended.values() and any(other.poll() is None for other in processes)
            if again is not None and code < 0 and goes_on:
                processes[rank] = again(rank)
            else:
                ended[rank] = code
        leader = next((rank for rank, process in enumerate(processes) if process.poll() is None), 0)
        _show(logs, leader, shown)
        time.sleep(0.05)
    codes = [process.returncode for process in processes]
    for rank in shown:
        _show(logs, rank, shown)
    for code in (0, 130):
        if code in codes:
            return code
    failed = next((rank for rank, code in enumerate(codes) if code > 0), 0)
    if failed == 0:
        return codes[0] if codes[0] >= 0 else 128 - codes[0]
    raise RankFailed(f"rank {failed} ended with status {codes[failed]}; {_tail(logs / f'rank-{failed}.log')}", 1)


def _show(logs: Path, rank: int, shown: dict[int, int]) -> None:
    """Prints what has come to a rank's log since it leads."""
    log = logs / f"rank-{rank}.log"
    if rank == 0 or not log.exists():
        return
    if rank not in shown:
        shown[rank] = log.stat().st_size
    with log.open("rb") as file:
        file.seek(shown[rank])
        text = file.read()
        shown[rank] = file.tell()
    if text:
        sys.stdout.write(text.decode(errors="replace"))
        sys.stdout.flush()


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()[-_LOG_LINES:]
    return f"{log} ends with: {' | '.join(lines)}" if lines else f"{log} is empty"


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(3.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stdin is not None:
        process.stdin.close()


def watch_launcher(on_loss: threading.Event) -> None:
    """Sets ``on_loss`` when the launcher dies, seen as the end of standard input; kills this process a minute later."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        on_loss.set()
        time.sleep(60.0)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()
