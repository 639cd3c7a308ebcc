"""Checkpoints on disk: written atomically, verified when read, the newest few and the best one kept.

A checkpoint is a folder ``step-00000050`` with the snapshot's files and a ``manifest.json`` that holds the size and
SHA-256 of each. It is written under a temporary name, synced, then renamed: a kill at any instant leaves either
the whole checkpoint or a leftover that the next save removes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from macft.checkpoint.snapshot import Snapshot
from macft.errors import CheckpointError

_FOLDER = re.compile(r"step-(\d{8})")
_MANIFEST = "manifest.json"


class CheckpointStore:
    """The checkpoints of one run under ``folder``; keeps the ``keep`` newest and the best."""

    def __init__(self, folder: Path, *, keep: int):
        self._folder = folder
        self._keep = keep

    def path(self, step: int) -> Path:
        """Where the checkpoint of ``step`` stands, or would stand."""
        return self._folder / f"step-{step:08d}"

    def save(self, snapshot: Snapshot) -> Path:
        """Writes ``snapshot`` durably and removes the checkpoints that are no longer needed.

        Raises:
            CheckpointError: the disk is full or the folder can't be written.
        """
        progress = snapshot.progress
        target = self.path(progress.step)
        partial = self._folder / f".partial-{progress.step:08d}"
        try:
            self._remove_partial()
            partial.mkdir(parents=True)
            manifest = {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in snapshot.files.items()}
            for name, data in {**snapshot.files, _MANIFEST: json.dumps(manifest, indent=2).encode()}.items():
                _write_durably(partial / name, data)
            _sync_folder(partial)
            if target.exists():
                shutil.rmtree(target)
            partial.rename(target)
            _sync_folder(self._folder)
        except OSError as error:
            raise CheckpointError(f"checkpoint {target} can't be written: {error.strerror or error}") from error
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
            files = {str(name): (folder / str(name)).read_bytes() for name in manifest}
            for name, data in files.items():
                if len(data) != manifest[name]["bytes"] or _sha256(data) != manifest[name]["sha256"]:
                    raise CheckpointError(f"checkpoint {folder}: {name} is damaged (size or SHA-256 differ)")
            snapshot = Snapshot(files)
            snapshot.progress  # noqa: B018  (parses it)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"checkpoint {folder} can't be read: {error}") from error
        return snapshot

    def newest_valid(self) -> tuple[Snapshot | None, list[str]]:
        """The newest checkpoint that verifies, if any, and one line for each newer one that had to be passed over."""
        passed_over: list[str] = []
        for step in self.steps():
            try:
                return self.load(step), passed_over
            except CheckpointError as error:
                passed_over.append(f"{error}; trying an older one")
        return None, passed_over

    def steps(self) -> list[int]:
        """Steps that have a checkpoint folder, newest first."""
        return sorted((step for step, _ in self._folders()), reverse=True)

    def _folders(self) -> Iterator[tuple[int, Path]]:
        if self._folder.is_dir():
            for path in self._folder.iterdir():
                if match := _FOLDER.fullmatch(path.name):
                    yield int(match[1]), path

    def _prune(self, *, newest: int, best: int | None) -> None:
        # A checkpoint beyond `newest` is of a history that a resume has left behind.
        steps = [step for step in self.steps() if step <= newest]
        needed = {*steps[: self._keep], best}
        for step, path in list(self._folders()):
            if step not in needed:
                shutil.rmtree(path, ignore_errors=True)

    def _remove_partial(self) -> None:
        for leftover in self._folder.glob(".partial-*"):
            shutil.rmtree(leftover)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
