"""Parses and formats sizes, times and speeds."""

from __future__ import annotations

import math
import re

_BYTES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_BITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}


def read_size(text: str) -> int:
    """Parses ``"64K"``, ``"64 KB"`` or ``"65536"`` to bytes (powers of 1024). ValueError if not a multiple of 4."""
    match = re.fullmatch(r"(\d+)\s*([KMG]?)B?", text.strip().upper())
    if match is None or (size := int(match[1]) * _BYTES[match[2]]) == 0 or size % 4:
        raise ValueError(f"'{text}' is not a size such as 4K, 1M or 64MB; it must be a multiple of 4 bytes")
    return size


def read_speed(text: str) -> float:
    """Parses ``"100mbit"`` or ``"2.5gbit"`` to bytes a second. ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)bit", text.strip().lower())
    if match is None or (speed := float(match[1]) * _BITS[match[2]] / 8) == 0:
        raise ValueError(f"'{text}' is not a speed such as 100mbit, 1gbit or 40gbit")
    return speed


def size_text(size: int) -> str:
    """Bytes as text: ``64 KB``."""
    for unit in ("G", "M", "K"):
        if size >= _BYTES[unit]:
            return f"{size / _BYTES[unit]:g} {unit}B"
    return f"{size} B"


def time_text(seconds: float) -> str:
    """Seconds as text: ``38.2 µs``, ``1.04 ms``, ``2.1 s``; empty for NaN."""
    if math.isnan(seconds):
        return ""
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= factor or unit == "µs":
            return f"{seconds / factor:.3g} {unit}"
    raise AssertionError


def speed_text(bytes_per_second: float) -> str:
    """Bytes a second as text in GB/s (1e9 bytes), as nccl-tests prints it: ``1.23``; empty for NaN."""
    return "" if math.isnan(bytes_per_second) else f"{bytes_per_second / 1e9:.3g}"
