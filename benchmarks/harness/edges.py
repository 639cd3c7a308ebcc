"""Kills of a rank at a named point of a run, or at a random moment, and what becomes of the run.

`tests/test_edges.py` has a few, `benchmarks/edges.py` many. The points are those of `macft.device.fault_points`.
"""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import psutil

from harness.runs import command, environment, on_hosts, ranks
from harness.ssh_hosts import Cluster
from macft.report.run_folder import RunFolder

_LONGEST = 240.0
_LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Kill:
    """Rank ``rank`` is killed when it reaches ``point``, or ``seconds`` after the start where there is none."""

    rank: int
    point: str = ""
    seconds: float = 0.0


@dataclass
class Outcome:
    """What became of a run. ``statuses``: of the launcher, or of each host's process that was not killed."""

    statuses: list[int]
    has_result: bool
    silence: float
    """The longest time in seconds, from the kill on, in which nothing was written to any terminal."""
    last_line: str
    """What was written before it."""
    seconds: float
    output: str = field(repr=False, default="")
    is_killed: bool = True

    @property
    def is_right(self) -> bool:
        """Success where there is a result, and only there."""
        return all((status == 0) == self.has_result for status in self.statuses)


class Terminal:
    """A command, and what it writes with the time of each piece."""

    def __init__(self, argv: Sequence[str], cwd: Path, variables: dict[str, str]):
        self.process = subprocess.Popen(
            argv,
            cwd=cwd,
            env={**environment(), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.output = ""
        self.lines: list[tuple[float, str]] = []
        """Each line with the time at which it came."""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line.decode(errors="replace")
            self.lines.append((time.monotonic(), line.decode(errors="replace").strip()))

    def close(self) -> None:
        """Waits for the rest of the output."""
        self._thread.join(60.0)
        if self.process.stdout is not None:
            self.process.stdout.close()


def local(folder: Path, overrides: Sequence[str], nodes: int, kill: Kill) -> Outcome:
    """A run of ``topology=local`` in ``folder``."""
    argv = command(*overrides, "topology=local", f"topology.nodes={nodes}", f"hydra.run.dir={folder}")
    terminal = Terminal(argv, folder.parent, _variables(kill))
    killed = _await([terminal], kill, lambda: ranks(terminal.process).get(kill.rank))
    return _outcome([terminal], [terminal], [folder], killed)


def hosts(folder: Path, overrides: Sequence[str], nodes: int, kill: Kill) -> Outcome:
    """A run of ``topology=hosts`` whose hosts are processes on this machine, with a folder each in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    terminals = [Terminal(command(*overrides, *own), folder, _variables(kill)) for own in on_hosts(folder, nodes)]
    victim = terminals[kill.rank]
    killed = _await(terminals, kill, lambda: psutil.Process(victim.process.pid))
    others = [terminal for terminal in terminals if terminal is not victim or killed is None]
    return _outcome(terminals, others, [folder / str(rank) for rank in range(nodes)], killed)


def ssh(folder: Path, overrides: Sequence[str], cluster: Cluster, kill: Kill) -> Outcome:
    """A run of ``topology=ssh`` on all hosts of ``cluster``, whose results come home into ``folder``."""
    names = ",".join(host.address for host in cluster.hosts)
    more = ["topology=ssh", f"topology.hosts=[{names}]", f"topology.python=['{sys.executable}']"]
    argv = command(*overrides, *more, f"hydra.run.dir={folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    terminal = Terminal(argv, folder.parent, {**cluster.environment(), **_variables(kill)})
    rank = str(kill.rank)
    killed = _await(
        [terminal], kill, lambda: next((each for each in cluster.agents() if each.info["cmdline"][-1] == rank), None)
    )
    return _outcome([terminal], [terminal], [folder], killed)


def _variables(kill: Kill) -> dict[str, str]:
    return {"MACFT_FAULT": f"{kill.point}:{kill.rank}:kill"} if kill.point else {}


def _await(terminals: Sequence[Terminal], kill: Kill, find: Callable[[], psutil.Process | None]) -> float | None:
    """Until all have ended; kills where the time says so. Returns when the victim was killed, None if it was not."""
    began = time.monotonic()
    victim: psutil.Process | None = None
    killed: float | None = None
    while any(terminal.process.poll() is None for terminal in terminals):
        now = time.monotonic()
        assert now - began < _LONGEST, "\n".join(terminal.output for terminal in terminals)
        if killed is None:
            try:
                victim = victim or find()
                if victim is not None and not kill.point and now - began > kill.seconds:
                    victim.send_signal(signal.SIGKILL)
                    killed = now
                elif victim is not None and kill.point and not _runs(victim):
                    killed = now
            except psutil.NoSuchProcess:
                pass
        time.sleep(_LOOK_SECONDS)
    if killed is None and kill.point and _was_killed(terminals):
        killed = time.monotonic()  # the rest ended before the next look
    return killed


def _was_killed(terminals: Sequence[Terminal]) -> bool:
    """Whether one of the commands was killed, or tells of a rank that was."""
    for terminal in terminals:
        terminal.close()
    return any(each.process.returncode == -signal.SIGKILL or "ended by signal 9" in each.output for each in terminals)


def _runs(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def _outcome(
    terminals: Sequence[Terminal], others: Sequence[Terminal], folders: Sequence[Path], killed: float | None
) -> Outcome:
    ended = time.monotonic()
    for terminal in terminals:
        terminal.close()
    lines = sorted(line for terminal in others for line in terminal.lines)
    since = ended if killed is None else killed
    before = [text for moment, text in lines if moment <= since][-1:] or ["nothing"]
    moments = [(since, f"the kill, after: {before[0]}"), *(line for line in lines if line[0] > since), (ended, "")]
    silence, last_line = max((after[0] - one[0], one[1]) for one, after in itertools.pairwise(moments))
    return Outcome(
        statuses=[terminal.process.returncode for terminal in others],
        has_result=any(_has_result(folder) for folder in folders),
        silence=silence,
        last_line=last_line,
        seconds=0.0,
        output="\n".join(terminal.output for terminal in terminals),
        is_killed=killed is not None,
    )


def _has_result(folder: Path) -> bool:
    if not RunFolder(folder).is_finished:
        return False
    return bool(mx.load(str(RunFolder(folder).adapters / "adapters.safetensors")))
