"""Several ranks as processes on this machine: starts them, passes on a wish to stop, and leaves none running."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from macft.cli.run_command import INTERRUPTED, how_it_ended
from macft.collective.matching import Texts
from macft.device.blas import available_cores
from macft.errors import MacftError
from macft.rendezvous.keystore import Keyring
from macft.rendezvous.server import RendezvousServer
from macft.report.phase_lines import PhaseLines
from macft.training.stop_request import NODES_STOP, announce

_GRACE_SECONDS = 20.0
"""How long the other ranks may take to end after one has failed."""
_QUIT_SECONDS = 4.0
"""How long they may take to quit."""
_REFUSAL_SECONDS = 2.0
"""How long the others may take to say why, after one has ended before all have met."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LOG_LINES = 5
_log = logging.getLogger("macft.launch")


class RankFailed(MacftError):
    """A rank's process ended with an error."""

    needs_logs = True

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class LocalRun:
    """A run whose ranks are processes on this machine.

    Attributes:
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
    """

    world_size: int
    folder: Path
    run_id: str
    must_match: Texts
    start_timeout: float
    resume: bool
    keyring: Keyring | None = None
    elastic: bool = False
    restart: bool = False


def launch_local(run: LocalRun, phases: PhaseLines, watch: Callable[[Callable[[], None]], None] | None = None) -> int:
    """Runs the ranks of ``run`` and waits for them; returns the run's exit status.

    Rank 0 uses this terminal; the others write to ``logs/rank-N.log`` in the run's folder. SIGINT, SIGTERM and SIGHUP
    ask all ranks to stop cleanly; a second SIGINT or SIGTERM ends them. The ranks watch their standard input: if this
    process ends, they stop.

    Args:
        run: Which ranks there are, and how they meet.
        phases: Say what the launch waits for.
        watch: Called again and again while the ranks run, and once after their end, with what stops the run in order.

    Raises:
        RankFailed: a rank other than 0 failed; the message contains the last lines of its log. Or one ended before the
            ranks had met.
        KeyboardInterrupt: the user wants to stop before the ranks have met, or twice.
    """
    logs = run.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    threads = max(1, available_cores() // run.world_size)
    server = RendezvousServer(
        "127.0.0.1:0",
        world_size=run.world_size,
        run_id=run.run_id,
        must_match=run.must_match,
        timeout=run.start_timeout,
        keyring=run.keyring,
    )
    processes: list[subprocess.Popen[bytes]] = []
    wish = StopWish(processes, server, watch)
    # In another thread than the main one, as in a program of its own, there are no signals to handle.
    signals = _SIGNALS if threading.current_thread() is threading.main_thread() else ()
    previous = {number: signal.signal(number, wish) for number in signals if not _is_ignored(number)}
    try:
        server.start()
        for rank in range(run.world_size):
            command = [sys.executable, "-m", "macft.launch.worker", str(run.folder), str(rank)]
            command += [server.address, run.run_id, *(["--resume"] if run.resume else [])]
            processes.append(_start(command, rank, logs, threads))
        if (status := _wait_until_met(server, processes, logs, wish, phases)) is not None:
            return status
        phases.close()
        restarter = _Restarter(run.folder, logs, threads) if run.restart else None
        return _wait_elastic(processes, logs, restarter, wish) if run.elastic else _wait(processes, logs, wish)
    finally:
        for process in processes:
            _end(process)
        server.close()
        for number, handler in previous.items():
            signal.signal(number, handler)
        wish.look()


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


def _is_ignored(number: int) -> bool:
    """Whether the signal was ignored when this process started, as by ``nohup``."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


class StopWish:
    """What the user wants of the ranks in ``processes``: a signal handler, and what follows from it."""

    def __init__(
        self,
        processes: list[subprocess.Popen[bytes]],
        server: RendezvousServer,
        watch: Callable[[Callable[[], None]], None] | None,
    ):
        self.count, self._watch = 0, watch
        self._processes, self._server, self._passed_on, self._ends_at = processes, server, 0, float("inf")

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP and self.count:  # a closed terminal may send it twice
            return
        self.count += 1
        if self.count == 1 and self._server.has_met:
            announce(NODES_STOP)

    @property
    def is_passed_on(self) -> bool:
        """Whether the ranks have been told."""
        return self._passed_on > 0

    def look(self) -> None:
        """Calls the ``watch`` of the launcher."""
        if self._watch is not None:
            self._watch(lambda: self(signal.SIGTERM, None))

    def pass_on(self) -> None:
        """Tells the ranks; those that don't quit in time are killed.

        Raises:
            KeyboardInterrupt: some had to be killed.
        """
        self.look()
        while self._passed_on < min(self.count, 2):
            self._passed_on += 1
            for process in self._running():
                process.terminate()
            if self._passed_on == 2:
                self._ends_at = time.monotonic() + _QUIT_SECONDS
        if time.monotonic() > self._ends_at and self._running():
            for process in self._running():
                process.kill()
            raise KeyboardInterrupt

    def _running(self) -> list[subprocess.Popen[bytes]]:
        return [process for process in self._processes if process.poll() is None]


def _wait_until_met(
    server: RendezvousServer, processes: list[subprocess.Popen[bytes]], logs: Path, wish: StopWish, phases: PhaseLines
) -> int | None:
    """Waits until all ranks have met. If one ends before, the others would wait for it: returns the exit status."""
    deadline = float("inf")
    missing: list[int] = []
    while not server.has_met:
        if missing != (missing := [rank for rank in range(len(processes)) if rank not in server.arrived]) and missing:
            ranks = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
            phases.begin(f"starting; waiting for {ranks} of {len(processes)}")
        if wish.count:
            for process in processes:
                process.kill()
            raise KeyboardInterrupt  # there is nothing to save
        codes = [process.poll() for process in processes]
        ended = next((rank for rank, code in enumerate(codes) if code is not None), None)
        code = None if ended is None else codes[ended]
        if code is not None and deadline == float("inf"):
            deadline = time.monotonic() + (_REFUSAL_SECONDS if code > 0 else 0.0)
        if ended is not None and code is not None and (None not in codes or time.monotonic() > deadline):
            if ended == 0 and code > 0:
                return code  # it has said why
            for process in processes:
                process.kill()  # they wait for it, and have nothing to save
            raise RankFailed(
                f"rank {ended} {how_it_ended(code)} before all ranks had met; {_tail(logs / f'rank-{ended}.log')}", 1
            )
        time.sleep(0.05)
    return None


def rank_status(process: subprocess.Popen[bytes], wish: StopWish) -> int | None:
    """How the rank's process ended; None: it runs. The signal that tells it to stop may end one that is ending."""
    code = process.poll()
    return INTERRUPTED if code == -signal.SIGTERM and wish.is_passed_on else code


def _wait(processes: list[subprocess.Popen[bytes]], logs: Path, wish: StopWish) -> int:
    """Waits for all ranks. After one has failed, the others have ``_GRACE_SECONDS`` to report it and end."""
    failed: int | None = None
    deadline = float("inf")
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        for rank, process in enumerate(processes):
            if failed is None and rank_status(process, wish) not in (None, 0, INTERRUPTED):
                failed, deadline = rank, time.monotonic() + _GRACE_SECONDS
                _log.warning("rank %d ended with status %d; the others have %g s", rank, process.poll(), _GRACE_SECONDS)
                if process.returncode < 0:  # else it has said why
                    announce(f"note: rank {rank} {how_it_ended(process.returncode)}")
        wish.pass_on()
        time.sleep(0.05)
    for rank, process in enumerate(processes):
        _end(process)
        _log.info("rank %d ended with status %d", rank, process.returncode)
    first = rank_status(processes[0], wish) or 0
    if failed is None or failed == 0:
        return first if first >= 0 else 128 - first
    how = how_it_ended(processes[failed].returncode)
    raise RankFailed(f"rank {failed} {how}; {_tail(logs / f'rank-{failed}.log')}", 1)


class _Restarter:
    """Starts a rank again, which then joins the run."""

    def __init__(self, folder: Path, logs: Path, threads: int):
        self._folder, self._logs, self._threads = folder, logs, threads

    def __call__(self, rank: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "macft.launch.worker", str(self._folder), str(rank), "-", "-", "--join"]
        return _start(command, rank, self._logs, self._threads)


def _wait_elastic(
    processes: list[subprocess.Popen[bytes]], logs: Path, restarter: _Restarter | None, wish: StopWish
) -> int:
    """Waits for all ranks, and shows the log of the next rank if rank 0 ends; returns the run's exit status."""
    shown: dict[int, int] = {}
    ended: dict[int, int] = {}
    while any(process.poll() is None for process in processes):
        for rank, process in enumerate(processes):
            if rank in ended or (code := rank_status(process, wish)) is None:
                continue
            is_running = 0 not in ended.values() and any(other.poll() is None for other in processes)
            if code < 0 and wish.count < 2:  # else it has said why
                announce(f"note: rank {rank} {how_it_ended(code)}")
            if restarter is not None and code < 0 and is_running and not wish.count:
                _log.warning("rank %d was ended by signal %d; starting it again", rank, -code)
                processes[rank] = restarter(rank)
            else:
                ended[rank] = code
                _log.info("rank %d ended with status %d", rank, code)
        leader = next((rank for rank, process in enumerate(processes) if process.poll() is None), 0)
        _show(logs, leader, shown)
        wish.pass_on()
        time.sleep(0.05)
    codes = [rank_status(process, wish) or 0 for process in processes]
    for rank, code in enumerate(codes):
        if rank not in ended:
            _log.info("rank %d ended with status %d", rank, code)
    for rank in shown:
        _show(logs, rank, shown)
    for code in (0, INTERRUPTED):  # a rank ends with 0 only if it knows that the results are on disk
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
    if not log.exists():
        return "its output is above"
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


def watch_launcher(on_loss: Callable[[], None]) -> None:
    """Calls ``on_loss`` when standard input ends, as it does with the launcher; kills this process a minute later."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        on_loss()
        time.sleep(60.0)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()
