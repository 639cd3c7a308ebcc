"""Files that are on disk when a call returns, and that nobody sees half-written."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from macft.errors import MacftError, ModelError

# On macOS fsync returns before the drive has written; this waits for the drive.
_FULL_SYNC: int | None = getattr(fcntl, "F_FULLFSYNC", None)


def write_atomically(path: Path, content: str | bytes | memoryview) -> None:
    """Replaces the contents of ``path``; a reader sees the old file or the new one, never a part.

    Raises:
        OSError: it can't be written; the old file is left as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    with replacement(path) as partial, partial.open("wb") as file:
        file.write(data)
        file.flush()
        sync(file.fileno())  # the name must not reach the disk before the contents do


@contextlib.contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to. At the end it replaces ``path``; after an exception it is removed."""
    partial = path.with_name(f".{path.name[:40]}.{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
        with contextlib.suppress(OSError):  # not every file system can sync a folder
            sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` to fill. At the end it becomes ``path``, which may be an empty folder until then.

    After an exception it is removed; a :class:`MacftError` about it then names ``path``.

    Raises:
        ModelError: it can't be made.
    """
    partial = path.with_name(f".{path.name[:40]}.{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(path)
    except OSError as error:
        raise ModelError(f"{path} can't be written: {error.strerror or error}") from error
    except MacftError as error:
        raise type(error)(str(error).replace(str(partial), str(path))) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def identity(path: Path) -> tuple[int, int] | None:
    """What changes when the file is replaced; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def sync_all(folder: Path) -> None:
    """Waits until the files in ``folder``, its name and theirs are on the disk."""
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                sync(file.fileno())
    for path in (folder, folder.parent):
        with contextlib.suppress(OSError):  # not every file system can sync a folder
            sync_folder(path)


def sync(descriptor: int) -> None:
    """Waits until what was written to ``descriptor`` is on the disk."""
    if _FULL_SYNC is not None:
        with contextlib.suppress(OSError):  # not every file system supports it
            fcntl.fcntl(descriptor, _FULL_SYNC)
            return
    os.fsync(descriptor)


def sync_folder(path: Path) -> None:
    """Waits until the names in the folder ``path`` are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)
