"""How fast this machine's disk reads: measured without the system's cache, and kept for plans and placements."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import mmap
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from macft.device.chips import own_chip
from macft.device.durable import write_atomically
from macft.device.kept_measurements import cache_folder, read_kept

UNKNOWN_DISK = 3e9
"""Bytes a second where nothing is known of a disk."""
_NAME = "disk-speed.json"
_BYTES, _PIECE = 256 << 20, 8 << 20
_FREE = 4 * _BYTES
_SECONDS, _PASSES = 3.0, 3
_LONGEST_RECORD = 4096
# On macOS: reads and writes of this file go past the system's cache.
_NO_CACHE: int | None = getattr(fcntl, "F_NOCACHE", None)


@dataclass(frozen=True)
class DiskSpeed:
    """Bytes a second, and where they are from: "measured", "table" (the chip's) or "assumed"."""

    bytes_per_second: float
    source: str


def disk_speed() -> DiskSpeed:
    """Of this machine: the measured one, otherwise that of its chip's table, otherwise :data:`UNKNOWN_DISK`."""
    measured = stored()
    if measured is not None:
        return DiskSpeed(measured, "measured")
    chip = own_chip()
    return DiskSpeed(chip.disk * 1e9, "table") if chip is not None else DiskSpeed(UNKNOWN_DISK, "assumed")


def stored(folder: Path | None = None) -> float | None:
    """The bytes a second that :func:`measure` kept; None if there are none."""
    try:
        speed = float(read_kept((folder or cache_folder()) / _NAME, longest=_LONGEST_RECORD)["bytes_per_second"])
    except (ValueError, KeyError, TypeError):
        return None
    return speed if math.isfinite(speed) and speed > 0 else None


def measure(folder: Path | None = None, *, size: int = _BYTES) -> float:
    """Writes a temporary file of ``size`` bytes where models are kept, reads it past the cache, and keeps the speed.

    Returns:
        Bytes a second, the best of up to three passes within three seconds.

    Raises:
        OSError: the folder can't be written, or has no room.
    """
    folder = folder or cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < max(_FREE, 4 * size):
        raise OSError(f"{folder} has less than {max(_FREE, 4 * size) >> 20} MiB free")
    path = folder / f".disk-speed.{os.getpid()}"
    try:
        _write(path, size)
        begun, best = time.perf_counter(), 0.0
        for _ in range(_PASSES):
            best = max(best, size / _read_seconds(path, size))
            if time.perf_counter() - begun > _SECONDS:
                break
    finally:
        path.unlink(missing_ok=True)
    write_atomically(folder / _NAME, json.dumps({"bytes_per_second": best, "time": time.time()}))
    return best


def _write(path: Path, size: int) -> None:
    piece = os.urandom(min(_PIECE, size))
    with path.open("wb") as file:
        if _NO_CACHE is not None:
            fcntl.fcntl(file.fileno(), _NO_CACHE, 1)
        for start in range(0, size, len(piece)):
            file.write(piece[: size - start])
        file.flush()
        os.fsync(file.fileno())


def _read_seconds(path: Path, size: int) -> float:
    """Seconds to read the file past the system's cache, as far as the system allows that."""
    direct = getattr(os, "O_DIRECT", 0)
    try:
        descriptor = os.open(path, os.O_RDONLY | direct)
    except OSError:  # the file system has no direct reads
        descriptor = os.open(path, os.O_RDONLY)
    try:
        if _NO_CACHE is not None:
            fcntl.fcntl(descriptor, _NO_CACHE, 1)
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(-1, _PIECE) as buffer:  # direct reads need memory that begins at a page
            started, left = time.perf_counter(), size
            while left > 0 and (count := os.readv(descriptor, [buffer])) > 0:
                left -= count
            return time.perf_counter() - started
    finally:
        os.close(descriptor)
