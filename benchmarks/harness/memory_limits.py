"""Processes that the system lets have so much memory and no more: as machines that are too small for a model."""

from __future__ import annotations

import itertools
import os
import time
from contextlib import suppress
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self

_numbers = itertools.count()
_ROOT = Path("/sys/fs/cgroup")


class MemoryLimit:
    """A limit of ``size`` bytes for the processes that are started with :attr:`prefix` before their command.

    It is a control group where this machine lets one be made (Linux, as root), which counts all that the processes
    have in memory, files that they read included; of these the kernel drops pages as it likes. A process that needs
    more is killed. Elsewhere it is ``ulimit -d``, the size of each process's own data; an allocation beyond fails.
    """

    def __init__(self, size: int):
        self.size = size
        self._group: Path | None = None
        self._is_v1 = False

    @property
    def kind(self) -> str:
        """What sets the limit."""
        if self._group is None:
            return "ulimit -d"
        return f"cgroup {'v1, memory.limit_in_bytes' if self._is_v1 else 'v2, memory.max'}"

    @property
    def prefix(self) -> list[str]:
        """Words before a command."""
        if self._group is None:
            return ["sh", "-c", f'ulimit -d {self.size // 1024} && exec "$@"', "sh"]
        return ["sh", "-c", f'echo $$ > {self._group}/cgroup.procs && exec "$@"', "sh"]

    @property
    def kills(self) -> int:
        """How many processes the kernel has killed for want of memory."""
        if self._group is None:
            return 0
        text = (self._group / ("memory.oom_control" if self._is_v1 else "memory.events")).read_text()
        return int(dict(line.split() for line in text.splitlines()).get("oom_kill", "0"))

    def __enter__(self) -> Self:
        name = f"macft-{os.getpid()}-{next(_numbers)}"
        parent = _own_v1_group()
        self._is_v1 = parent is not None
        group = (parent or _ROOT) / name
        try:
            group.mkdir()
        except OSError:
            return self
        try:
            limit = group / ("memory.limit_in_bytes" if self._is_v1 else "memory.max")
            limit.write_text(str(self.size))
            with suppress(OSError):  # without swap
                (group / ("memory.memsw.limit_in_bytes" if self._is_v1 else "memory.swap.max")).write_text(
                    str(self.size) if self._is_v1 else "0"
                )
            self._group = group
        except OSError:
            group.rmdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._group is None:
            return
        for _ in range(50):  # a process that has just ended is in it for a moment
            try:
                self._group.rmdir()
                return
            except OSError:
                time.sleep(0.1)


def _own_v1_group() -> Path | None:
    """This process's group of the memory controller of version 1, None where there is none."""
    for line in Path("/proc/self/cgroup").read_text().splitlines() if Path("/proc/self/cgroup").exists() else []:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return _ROOT / "memory" / PurePosixPath(path.lstrip("/"))
    return None
