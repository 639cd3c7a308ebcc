"""SHA-256 of large files, remembered in the user's cache, so that only the first start reads them for it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import platformdirs

from macft.logs.run_log import console_logger

_WORTH_KEEPING = 1_000_000
"""Smaller files are read each time, in a few milliseconds."""
_WORTH_TELLING = 8_000_000_000
"""So many bytes take some seconds to read."""
_THREADS = 4

_log = console_logger("macft.model")


def file_digests(files: Sequence[Path], *, cache_dir: Path | None = None) -> list[str]:
    """The SHA-256 of each of ``files``, in hexadecimal.

    A digest is kept with the file's size, its number on the disk and the times of the last change of contents and
    status. It counts only as long as these are the same, so a copy that keeps the old time is found, too. Processes
    that want the same file's digest at the same time read it once.

    Args:
        files: Existing files; links are followed.
        cache_dir: Where digests are kept, instead of macft's folder in the user's cache.

    Raises:
        OSError: A file can't be read. A cache that can't be written is not an error.
    """
    folder = (cache_dir or platformdirs.user_cache_path("macft")) / "digests"
    unknown = [path for path in files if path.stat().st_size >= _WORTH_KEEPING and _kept(path, folder) is None]
    if (size := sum(path.stat().st_size for path in unknown)) >= _WORTH_TELLING:
        _log.warning("Reading %d files of the model (%.0f GB) once, to compare the nodes", len(unknown), size / 1e9)
    with ThreadPoolExecutor(_THREADS) as pool:  # hashlib frees the interpreter while it works
        return list(pool.map(lambda path: _digest(path, folder), files))


def _digest(path: Path, folder: Path) -> str:
    if path.stat().st_size < _WORTH_KEEPING:
        return _read(path)
    if (kept := _kept(path, folder)) is not None:
        return kept
    with _locked(_entry(path, folder).with_suffix(".lock")):
        if (kept := _kept(path, folder)) is not None:  # another process has read it meanwhile
            return kept
        before, digest = _state(path), _read(path)
        if _state(path) == before:
            _keep(path, folder, {**before, "sha256": digest})
        return digest


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state(path: Path) -> dict[str, str | int]:
    """What shows whether a file is still the same one."""
    real = path.resolve()
    status = real.stat()
    return {
        "path": str(real),
        "size": status.st_size,
        "number": status.st_ino,
        "changed": status.st_mtime_ns,
        "status_changed": status.st_ctime_ns,
    }


def _entry(path: Path, folder: Path) -> Path:
    return folder / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.json"


def _kept(path: Path, folder: Path) -> str | None:
    try:
        entry = json.loads(_entry(path, folder).read_text(encoding="utf-8"))
        digest = entry.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return digest if isinstance(digest, str) and entry == _state(path) else None


def _keep(path: Path, folder: Path, entry: dict[str, str | int]) -> None:
    target = _entry(path, folder)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        partial.write_text(json.dumps(entry), encoding="utf-8")
        partial.replace(target)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lets one process at a time go on; all of them where the cache can't be written."""
    lock = filelock.FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()  # released when that process ends, in any way
    except (OSError, NotImplementedError):
        pass
    try:
        yield
    finally:
        lock.release()
