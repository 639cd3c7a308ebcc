"""Several ranks as processes on this machine: starts them, forwards Ctrl-C, and leaves none running."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import FrameType

from macft.collective.matching import Texts
from macft.device.blas import available_cores
from macft.errors import MacftError
from macft.rendezvous.keystore import Keyring
from macft.rendezvous.server import RendezvousServer
from macft.training.stop_request import handled_by

_GRACE_SECONDS = 20.0
"""How long the other ranks may take to end after one has failed."""
_LOG_LINES = 5
_log = logging.getLogger("macft.launch")


class RankFailed(MacftError):
    """A rank's process ended with an error."""

    needs_logs = True

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def launch_local(
    world_size: int,
    folder: Path,
    *,
    run_id: str,
    must_match: Texts,
    start_timeout: float,
    resume: bool,
    keyring: Keyring | None = None,
    elastic: bool = False,
    restart: bool = False,
    watch: Callable[[Callable[[], None]], None] | None = None,
) -> int:
    """Runs ``world_size`` ranks of the run in ``folder`` and waits for them; returns rank 0's exit status.

    Rank 0 uses this terminal; the others write to ``folder/logs/rank-N.log``. SIGINT and SIGTERM are forwarded to rank
    0, which stops the whole run cleanly. The ranks watch their standard input: if this process ends, they stop.

    Args:
        world_size: The number of ranks.
        folder: The run's folder, with the configuration that is proposed.
        run_id: Of the run; see :class:`~macft.rendezvous.connect.RankConfig`.
        must_match: Settings and versions that must be the same on all ranks, by name.
        start_timeout: Seconds within which all ranks must meet.
        resume: Whether the ranks continue from the last checkpoint.
        keyring: This machine's keys. None: no encryption.
        elastic: Whether the other ranks continue without a rank that ends. If rank 0 ends, the output of the next rank
            is shown here, and that rank gets the signals.
        restart: Whether a rank that was killed is started again and joins.
        watch: Called again and again while the ranks run, and once after their end, with what stops the run in order.

    Raises:
        RankFailed: a rank other than 0 failed; the message contains the last lines of its log.
    """
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    threads = max(1, available_cores() // world_size)
    server = RendezvousServer(
        "127.0.0.1:0",
        world_size=world_size,
        run_id=run_id,
        must_match=must_match,
        timeout=start_timeout,
        keyring=keyring,
    )
    processes: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)  # this rank tells the others
                return

    def look() -> None:
        if watch is not None:
            watch(lambda: forward(signal.SIGINT, None))

    signals = ExitStack()
    try:
        signals.enter_context(handled_by(forward))
        server.start()
        for rank in range(world_size):
            command = [sys.executable, "-m", "macft.launch.worker", str(folder), str(rank), server.address, run_id]
            processes.append(_start([*command, *(["--resume"] if resume else [])], rank, logs, threads))
        restarter = _Restarter(folder, logs, threads) if restart else None
        return _wait_elastic(processes, logs, restarter, look) if elastic else _wait(processes, logs, look)
    finally:
        for process in processes:
            _end(process)
        server.close()
        signals.close()
        look()


def _start(command: list[str], rank: int, logs: Path, threads: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": str(threads)}
    # A session of its own: Ctrl-C in the terminal reaches only the launcher, which forwards it exactly once.
    with nullcontext() if rank == 0 else (logs / f"rank-{rank}.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=None if log is None else subprocess.STDOUT,
            start_new_session=True,
        )
    _log.info("rank %d started, process %d, %d threads", rank, process.pid, threads)
    return process


def _wait(processes: list[subprocess.Popen[bytes]], logs: Path, look: Callable[[], None]) -> int:
    """Waits for all ranks. After one has failed, the others have ``_GRACE_SECONDS`` to report it and end."""
    failed: int | None = None
    deadline = float("inf")
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        for rank, process in enumerate(processes):
            if failed is None and process.poll() not in (None, 0, 130):
                failed, deadline = rank, time.monotonic() + _GRACE_SECONDS
                _log.warning("rank %d ended with status %d; the others have %g s", rank, process.poll(), _GRACE_SECONDS)
        look()
        time.sleep(0.05)
    for rank, process in enumerate(processes):
        _end(process)
        _log.info("rank %d ended with status %d", rank, process.returncode)
    first = processes[0].returncode
    if failed is None or failed == 0:
        return first if first >= 0 else 128 - first
    code = processes[failed].returncode
    how = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
    raise RankFailed(f"rank {failed} {how}; {_tail(logs / f'rank-{failed}.log')}", 1)


class _Restarter:
    """Starts a rank again, which then joins the run."""

    def __init__(self, folder: Path, logs: Path, threads: int):
        self._folder, self._logs, self._threads = folder, logs, threads

    def __call__(self, rank: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "macft.launch.worker", str(self._folder), str(rank), "-", "-", "--join"]
        return _start(command, rank, self._logs, self._threads)


def _wait_elastic(
    processes: list[subprocess.Popen[bytes]], logs: Path, restarter: _Restarter | None, look: Callable[[], None]
) -> int:
    """Waits for all ranks, and shows the log of the next rank if rank 0 ends; returns the run's exit status."""
    shown: dict[int, int] = {}
    ended: dict[int, int] = {}
    while any(process.poll() is None for process in processes):
        for rank, process in enumerate(processes):
            if rank in ended or (code := process.poll()) is None:
                continue
            is_running = 0 not in ended.values() and any(other.poll() is None for other in processes)
            if restarter is not None and code < 0 and is_running:
                _log.warning("rank %d was ended by signal %d; starting it again", rank, -code)
                processes[rank] = restarter(rank)
            else:
                ended[rank] = code
                _log.info("rank %d ended with status %d", rank, code)
        leader = next((rank for rank, process in enumerate(processes) if process.poll() is None), 0)
        _show(logs, leader, shown)
        look()
        time.sleep(0.05)
    codes = [process.returncode for process in processes]
    for rank, code in enumerate(codes):
        if rank not in ended:
            _log.info("rank %d ended with status %d", rank, code)
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
    """Prints what a rank has written to its log since it leads the run."""
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
    """Sets ``on_loss`` when standard input ends, as it does with the launcher; kills this process a minute later."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        on_loss.set()
        time.sleep(60.0)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()
