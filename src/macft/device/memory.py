"""How much memory a process has for a run: of the machine, and of the limits that the system sets it on Linux."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# isort: split
import mlx.core as mx
import psutil

_CGROUPS = Path("/sys/fs/cgroup")
_V2_LIMITS: tuple[str, ...] = ("memory.max", "memory.high")
_V1_LIMITS: tuple[str, ...] = ("memory.limit_in_bytes",)
_GROWTH = 48 * 2**20
"""Bytes that a process takes beside MLX's arrays after it was planned: threads, modules, buffers of the network."""
_UNTOUCHED = {"VmData": 192 * 2**20, "VmSize": 768 * 2**20}
"""What it asks for besides and hardly touches: stacks and heaps of threads, buffers of OpenBLAS."""


def usable_bytes(share: float = 1.0) -> float:
    """Memory that MLX may use in this process, which has a ``share`` of its machine's.

    On a GPU it is what Metal recommends, or the card's. On a CPU it is the machine's or the container's, without what
    the process holds already: Python, its libraries, the rows. Limits of the process itself (``ulimit``) are not
    shared with others.
    """
    info = mx.device_info()
    for key in ("max_recommended_working_set_size", "memory_size"):
        if mx.default_device() != mx.cpu and info.get(key):
            return share * float(info[key])
    machine = min(float(psutil.virtual_memory().total), cgroup_limit())
    return max(1.0, min(share * machine - _held("RssAnon"), _room_of_process()) - _GROWTH)


def cgroup_limit(cgroups: Path = _CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> float:
    """The least memory limit of the control groups that this process is in, in bytes; infinite without one.

    A limit of any group above the process's own holds too. Inside a container the paths in ``membership`` may be those
    of the host; then the root of the mounted hierarchy is the container's group.
    """
    return min((_number(file) for file in _limit_files(cgroups, membership)), default=math.inf)


def _limit_files(cgroups: Path, membership: Path) -> Iterator[Path]:
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:  # not on Linux
        return
    for line in lines:  # "4:memory:/path" in version 1, "0::/path" in version 2
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = cgroups, _V2_LIMITS
        elif "memory" in controllers.split(","):
            root, names = cgroups / "memory", _V1_LIMITS
        else:
            continue
        own = PurePosixPath(path.lstrip("/"))
        for group in (own, *own.parents):
            yield from (root / group / name for name in names)


def _number(file: Path) -> float:
    try:
        return float(file.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such group here, or "max"
        return math.inf


def _room_of_process() -> float:
    """What the process may still allocate by its own limits (``ulimit -d``, ``ulimit -v``), infinite without them."""
    if sys.platform != "linux":
        return math.inf
    import resource

    sizes = ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize"))
    limits = [(resource.getrlimit(limit)[0], size) for limit, size in sizes]
    rooms = (limit - _held(size) - _UNTOUCHED[size] for limit, size in limits if limit != resource.RLIM_INFINITY)
    return min(rooms, default=math.inf)


def _held(name: str) -> float:
    """A size that the process has now, by its name in ``/proc/self/status``, in bytes; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    found = next((line.split()[1] for line in lines if line.startswith(f"{name}:")), "0")
    return 1024.0 * float(found)
