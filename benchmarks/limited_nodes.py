"""Nodes as processes, each with a core, a memory limit and perhaps a network card of its own; what they take."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Self

from harness.memory_limits import MemoryLimit
from harness.runs import free_ports
from shaped_links import ShapedLinks

_LOOK_SECONDS = 0.02
_END_SECONDS = 30.0


@dataclass
class Ended:
    """A node's process: its exit status, its output and errors, the most it had in memory (bytes), kills."""

    status: int
    output: str
    errors: str
    peak: int
    kills: int


@dataclass
class Limited:
    """Places for ``nodes`` processes, which may have ``limit`` bytes each, behind network cards of speed ``link``.

    None: there is no limit, or no card.
    """

    nodes: int
    limit: int | None
    link: str | None
    folder: Path
    _limits: list[MemoryLimit] = field(default_factory=list, init=False)
    _links: ShapedLinks | None = field(default=None, init=False)
    _started: list[Watched] = field(default_factory=list, init=False)
    _stack: ExitStack = field(default_factory=ExitStack, init=False)

    def __enter__(self) -> Self:
        if self.limit is not None:
            self._limits = [self._stack.enter_context(MemoryLimit(self.limit)) for _ in range(self.nodes)]
        if self.link is not None:
            self._links = self._stack.enter_context(ShapedLinks(self.nodes, self.link))
        return self

    def __exit__(self, *error: object) -> None:
        for each in self._started:
            if each.process.poll() is None:
                each.process.kill()
                each.process.wait()
        self._stack.close()

    @property
    def kind(self) -> str:
        """What limits the memory."""
        return self._limits[0].kind if self._limits else "nothing"

    def hosts(self) -> list[str]:
        """An address of each node, with two free ports after it."""
        if self._links is not None:
            return [f"{address.rpartition(':')[0]}:17070" for address in self._links.addresses("nodes")]
        return [f"127.0.0.1:{port}" for port in free_ports(self.nodes)]

    def start(self, rank: int, arguments: Sequence[str], *, variables: dict[str, str] | None = None) -> Watched:
        """A Python process with ``arguments`` on node ``rank``."""
        words = list(self._limits[rank].prefix) if self._limits else []
        if self._links is not None:
            # Not `ip netns exec`: that also hides /sys/fs/cgroup, where the process finds its limit.
            words += ["nsenter", f"--net=/run/netns/{self._links.prefixes[rank][-1]}"]
        words += ["taskset", "--cpu-list", str(sorted(os.sched_getaffinity(0))[rank % self._cores])]
        environment = {
            **os.environ,
            "OPENBLAS_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "MACFT_KEYS": str(self.folder / "keys"),
            **(variables or {}),
        }
        limit = self._limits[rank] if self._limits else None
        self._started.append(Watched([*words, sys.executable, *arguments], environment, self.folder, limit))
        return self._started[-1]

    @property
    def cores(self) -> int:
        """Cores that the nodes have together."""
        return min(self.nodes, self._cores)

    @property
    def _cores(self) -> int:
        return len(os.sched_getaffinity(0))


class Watched:
    """A process whose memory is looked at until it ends."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path, limit: MemoryLimit | None):
        self._limit, self._peak = limit, 0
        self._kills = 0 if limit is None else limit.kills
        self._texts: dict[str, str] = {}
        self.process = subprocess.Popen(
            command,
            env=environment,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._threads = [
            threading.Thread(target=self._read, args=("output", self.process.stdout), daemon=True),
            threading.Thread(target=self._read, args=("errors", self.process.stderr), daemon=True),
            threading.Thread(target=self._look, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def tell(self, line: str) -> None:
        """Writes to its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def ended(self, seconds: float) -> Ended:
        """Waits for its end, which is enforced after ``seconds``."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for thread in self._threads:
            thread.join(_END_SECONDS)
        kills = 0 if self._limit is None else self._limit.kills - self._kills
        texts = (self._texts.get(name, "") for name in ("output", "errors"))
        return Ended(self.process.returncode, *texts, self._peak, kills)

    def _read(self, name: str, stream: IO[str]) -> None:
        self._texts[name] = stream.read()

    def _look(self) -> None:
        """The kernel's own mark of the most that was resident, pages of mapped files included."""
        status = Path(f"/proc/{self.process.pid}/status")
        while self.process.poll() is None:
            try:
                if found := re.search(r"VmHWM:\s+(\d+)", status.read_text()):
                    self._peak = max(self._peak, 1024 * int(found[1]))
            except OSError:
                return
            time.sleep(_LOOK_SECONDS)


def drop_from_cache(folder: Path) -> None:
    """Drops the weight files from the system's cache, so that it is the nodes that read them, and that pay for it."""
    os.sync()
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
