"""Checkpoints on disk: written atomically, verified when read, the newest few and the best one kept.

A checkpoint is a folder ``step-00000050`` with the snapshot's files and a ``manifest.json`` that holds the size and
SHA-256 of each. It is written under a temporary name, synced, then renamed: a process that is killed leaves either the
whole checkpoint or a partial one that the next save removes. Several processes may save into one folder.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from macft.checkpoint.snapshot import ADAPTER, CODEC, OPTIMIZER, OUTER, PROGRESS, Snapshot
from macft.device.durable import sync, sync_folder
from macft.errors import CheckpointError

log = logging.getLogger("macft.checkpoint")
_FOLDER = re.compile(r"step-(\d{8})")
_LEFTOVER = re.compile(r"\.partial-\d{8}-(?P<process>\d+)@(?P<host>.*?)(\.old)?")
_MANIFEST = "manifest.json"
_NEEDED = {ADAPTER, OPTIMIZER, PROGRESS}
_FILES = _NEEDED | {CODEC, OUTER}
_DAY = 86400.0


class CheckpointStore:
    """The checkpoints of one run in ``folder``; keeps the ``keep_last`` newest and the best."""

    def __init__(self, folder: Path, *, keep_last: int):
        self._folder = folder
        self._keep_last = keep_last

    def path(self, step: int) -> Path:
        """The folder of the checkpoint of ``step``, which need not exist."""
        return self._folder / f"step-{step:08d}"

    def save(self, snapshot: Snapshot) -> Path:
        """Writes ``snapshot`` durably and removes the checkpoints that are no longer needed.

        Raises:
            CheckpointError: the disk is full or the folder can't be written.
        """
        progress, start = snapshot.progress, time.monotonic()
        target = self.path(progress.step)
        partial = self._folder / f".partial-{progress.step:08d}-{os.getpid()}@{platform.node()}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            partial.mkdir()
            try:
                _write_all(partial, snapshot.files)
                _move_into_place(partial, target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)  # on a full disk, frees the space at once
            sync_folder(self._folder)
        except OSError as error:
            log.warning("%s can't be written: %s", target.name, error)
            raise CheckpointError(f"checkpoint {target} can't be written: {error.strerror or error}") from error
        size = sum(map(len, snapshot.files.values()))
        log.info("saved %s: %d bytes in %.2f s", target.name, size, time.monotonic() - start)
        self._prune(newest=progress.step, best=progress.best_step)
        return target

    def load(self, step: int) -> Snapshot:
        """Reads and verifies the checkpoint of ``step``.

        Raises:
            CheckpointError: it is missing, incomplete or damaged; the message says which file.
        """
        folder = self.path(step)
        try:
            manifest = json.loads((folder / _MANIFEST).read_bytes())
            if not _NEEDED <= manifest.keys() <= _FILES:
                raise CheckpointError(f"checkpoint {folder}: {_MANIFEST} doesn't list the files of a checkpoint")
            files = {str(name): (folder / str(name)).read_bytes() for name in manifest}
            for name, data in files.items():
                if _entry(data) != manifest[name]:
                    raise CheckpointError(
                        f"checkpoint {folder}: {name} is damaged: its {_difference(data, manifest[name])}"
                    )
            snapshot = Snapshot(files)
            snapshot.progress  # noqa: B018  (parses it)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"checkpoint {folder} can't be read: {error}") from error
        return snapshot

    def newest_valid(self) -> tuple[Snapshot | None, list[str]]:
        """The newest checkpoint that is valid, or None, and one line for each newer one that is not."""
        skipped: list[str] = []
        for step in self.steps():
            try:
                return self.load(step), skipped
            except CheckpointError as error:
                log.warning("%s", error)
                skipped.append(f"{error}; skipped, an older one is looked for")
        return None, skipped

    def steps(self) -> list[int]:
        """Steps that have a checkpoint folder, newest first."""
        return sorted((step for step, _ in self._folders()), reverse=True)

    def _folders(self) -> Iterator[tuple[int, Path]]:
        if self._folder.is_dir():
            for path in self._folder.iterdir():
                if match := _FOLDER.fullmatch(path.name):
                    yield int(match[1]), path

    def _prune(self, *, newest: int, best: int | None) -> None:
        # A checkpoint beyond `newest` belongs to an attempt from before a resume.
        steps = [step for step in self.steps() if step <= newest]
        needed = {*steps[: self._keep_last], best}
        for step, path in list(self._folders()):
            if step not in needed:
                shutil.rmtree(path, ignore_errors=True)
                log.info("removed %s: not among the newest %d, nor the best", path.name, self._keep_last)

    def _remove_leftovers(self) -> None:
        for leftover in self._folder.glob(".partial-*"):
            if not _is_being_written(leftover):
                shutil.rmtree(leftover, ignore_errors=True)
                log.info("removed %s: left by an interrupted save", leftover.name)


def _is_being_written(partial: Path) -> bool:
    """Whether another process, here or on another host that shares this disk, may still be writing it."""
    match = _LEFTOVER.fullmatch(partial.name)
    if match is None or int(match["process"]) == os.getpid():
        return False
    if match["host"] != platform.node():
        try:
            return time.time() - partial.stat().st_mtime < _DAY
        except OSError:
            return False
    try:
        os.kill(int(match["process"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _write_all(folder: Path, files: dict[str, bytes]) -> None:
    manifest = {name: _entry(data) for name, data in files.items()}
    for name, data in {**files, _MANIFEST: json.dumps(manifest, indent=2).encode()}.items():
        with (folder / name).open("wb") as file:
            file.write(data)
            file.flush()
            sync(file.fileno())
    sync_folder(folder)


def _move_into_place(partial: Path, target: Path) -> None:
    """Renames ``partial`` to ``target``, and replaces an existing one, which is damaged or of an earlier run."""
    old = partial.with_name(f"{partial.name}.old")
    with contextlib.suppress(FileNotFoundError):
        target.rename(old)
    try:
        partial.rename(target)
    except OSError as error:
        # Another node of this run, with the same folder, has just written its own, which has the same content.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    shutil.rmtree(old, ignore_errors=True)


def _entry(data: bytes) -> dict[str, int | str]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _difference(data: bytes, entry: dict[str, int | str]) -> str:
    if len(data) != entry["bytes"]:
        return f"size is {len(data)} bytes where {entry['bytes']} were written"
    return "SHA-256 is not that of what was written"
