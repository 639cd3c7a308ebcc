"""The folder of a run, taken by one run at a time.

A run never writes into the folder of another one. Nothing of a command that is refused stays behind: a folder that was
made for it is removed, and one that was there before is as it was. ``config.yaml`` is what
makes a folder that of a run; :meth:`RunFolder.begin` writes it once all checks have passed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from macft.config.overrides import resume_command
from macft.config.schema import TrainConfig
from macft.config.yaml import must_match, read
from macft.device.durable import identity
from macft.errors import ConfigError
from macft.report.latest import leads_through_link
from macft.report.run_folder import RunFolder

_PROBE_BYTES = 64 * 1024
"""More than what is written before the first checkpoint, whose failure doesn't end a run."""
_ANOTHER_DISK = "free space or give a folder on another disk"


@dataclass
class Claim:
    """A folder that belongs to this run until the end of the ``with`` statement.

    Attributes:
        path: The folder.
        made: The folders that were made for it, the outermost first.
        before: What was in it.
        keeps_logs: Whether the folder stays even if the run has not begun.
    """

    path: Path
    made: list[Path]
    before: frozenset[Path]
    _lock: int
    keeps_logs: bool = False

    def __post_init__(self) -> None:
        self._config_before = identity(RunFolder(self.path).config)

    @property
    def is_new(self) -> bool:
        """Whether the folder was made for this run."""
        return bool(self.made)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        folder = RunFolder(self.path)
        names_before = {path.name for path in self.before}
        has_begun = identity(folder.config) != self._config_before or bool({*folder.results()} - names_before)
        if not has_begun and not self.keeps_logs:
            with contextlib.suppress(OSError):
                self._restore()
        os.close(self._lock)

    def abandon(self) -> str:
        """What :meth:`__exit__` does, for a process that ends at once; returns the line for its user."""
        self.__exit__()
        return after_interrupt(self.path)

    def _restore(self) -> None:
        for path in set(self.path.iterdir()) - self.before:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        _remove_empty(self.made)


def claim(wanted: Path, config: TrainConfig, *, key: str, is_named: bool = True, resume: bool = False) -> Claim:
    """Takes the folder ``wanted`` for a run of ``config``, and makes it if necessary.

    Args:
        wanted: The folder. Unless it ``is_named`` another run may have got it in the same second; then this one gets
            ``wanted-2``, and so on.
        config: Of the run.
        key: What the messages begin with.
        is_named: Whether the user chose the name.
        resume: Whether the run in the folder goes on.

    Raises:
        ConfigError: another run is in the folder, or it can't be written; nothing was changed.
    """
    if not resume and leads_through_link(wanted.absolute()):
        raise ConfigError(
            f"{key}: {wanted} leads through runs/latest, which is the newest run; give another name or folder"
        )
    path, made = _make_or_explain(wanted, key, is_named=is_named)
    with ExitStack() as undo:
        undo.callback(_remove_empty, made)
        try:
            lock = _lock(path, key, shared=_shares_folder(config))
            undo.callback(os.close, lock)
            if not resume and (trouble := _trouble(RunFolder(path), config)):
                raise ConfigError(f"{key}: {path} {trouble}")
            before = frozenset(path.iterdir())
            _try_to_write(path)
        except OSError as error:
            raise ConfigError(f"{key}: {path} can't be written ({error.strerror}); {_ANOTHER_DISK}") from error
        undo.pop_all()
    return Claim(path, made, before, lock)


def claim_sweep(wanted: Path, config: TrainConfig, *, key: str, is_named: bool) -> Path:
    """Makes the folder of a sweep, in which each job claims one; returns its path.

    Raises:
        ConfigError: another sweep is in it, or it can't be made.
    """
    path, made = _make_or_explain(wanted, key, is_named=is_named)
    if (path / "multirun.yaml").exists() and not config.report.overwrite:
        raise ConfigError(
            f"{key}: {path} holds another sweep; give another {key}, or replace its runs by report.overwrite=true"
        )
    try:
        _try_to_write(path)
    except OSError as error:
        _remove_empty(made)
        raise ConfigError(f"{key}: {path} can't be written ({error.strerror}); {_ANOTHER_DISK}") from error
    return path


def _make_or_explain(wanted: Path, key: str, *, is_named: bool) -> tuple[Path, list[Path]]:
    try:
        return _make(wanted.absolute(), is_named=is_named)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"{key}: {error.filename} is a file; give a folder") from None
    except OSError as error:
        raise ConfigError(f"{key}: {wanted} can't be made ({error.strerror}); {_ANOTHER_DISK}") from error


def _make(wanted: Path, *, is_named: bool) -> tuple[Path, list[Path]]:
    """Makes the folder; returns its path and all folders that did not exist before."""
    missing = [path for path in reversed(wanted.parents) if not path.exists()]
    try:
        wanted.parent.mkdir(parents=True, exist_ok=True)
        if is_named and wanted.is_dir():
            return wanted, missing
        for number in itertools.count(1):
            path = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
            try:
                path.mkdir()
                return path, [*missing, path]
            except FileExistsError:
                if is_named and not wanted.is_dir():
                    raise
                if is_named:
                    return wanted, missing
    except OSError:
        _remove_empty(missing)
        raise
    raise AssertionError


def _trouble(folder: RunFolder, config: TrainConfig) -> str:
    """Why a new run can't use ``folder``, in the words after its path; empty if it can."""
    if config.report.overwrite or not (found := folder.results()):
        return ""
    if "config.yaml" not in found:
        return f"holds {', '.join(found)}, which the run would write; give another hydra.run.dir"
    if config.topology.join is not None and _is_same_run(folder, config):
        return ""
    return (
        f"holds another run; continue it: {resume_command(folder.path)}; or give another hydra.run.dir, "
        "or replace that run by report.overwrite=true"
    )


def _is_same_run(folder: RunFolder, config: TrainConfig) -> bool:
    """Whether the node that wants to join has been in that run before."""
    try:
        return must_match(read(folder.config), of_newcomer=True) == must_match(config, of_newcomer=True)
    except ConfigError:
        return False


def _shares_folder(config: TrainConfig) -> bool:
    """Whether several processes of one run, each started by hand, may have the same folder."""
    return config.topology.kind == "hosts" or config.topology.join is not None or config.collective.backend == "mlx"


def _lock(path: Path, key: str, *, shared: bool) -> int:
    """A descriptor that keeps the folder locked while it is open: it is closed even if this process is killed."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(f"{key}: {path}: a run is going on there; wait for its end, or give another folder") from None
    except OSError:  # a file system without locks
        pass
    return descriptor


def _try_to_write(path: Path) -> None:
    """Raises OSError where the folder can't be written or its disk is full."""
    probe = path / f".probe.{os.getpid()}"
    try:
        with probe.open("wb") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _remove_empty(folders: list[Path]) -> None:
    for folder in reversed(folders):
        try:
            folder.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                raise


def after_interrupt(folder: Path) -> str:
    """What the user is told when the run in ``folder`` was interrupted at once."""
    if RunFolder(folder).has_checkpoint:
        return f"interrupted; the newest checkpoint is kept; continue with: {resume_command(folder)}"
    return "interrupted; no checkpoint had been saved"
