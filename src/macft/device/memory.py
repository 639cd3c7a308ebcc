"""How much memory a node has for a run."""

from __future__ import annotations

from pathlib import Path

# isort: split
import mlx.core as mx
import psutil

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def usable_bytes() -> float:
    """Memory MLX may use on this machine: what Metal recommends, a CUDA card's, or the machine's own on a CPU."""
    info = mx.device_info()
    for key in ("max_recommended_working_set_size", "memory_size"):
        if mx.default_device() != mx.cpu and info.get(key):
            return float(info[key])
    return min(float(psutil.virtual_memory().total), *map(_limit, _CGROUP_LIMITS))


def _limit(path: str) -> float:
    """A container's memory limit, infinite where there is none."""
    try:
        return float(Path(path).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return float("inf")
