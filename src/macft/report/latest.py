"""``runs/latest``: a symbolic link to the run that began last below the folder ``runs``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from uuid import uuid4

NAME = "latest"
_RUNS = "runs"
_DEEPEST = 2
"""Levels from ``runs`` to a run's folder, ``runs/NAME/TIME``."""


def followed(folder: Path) -> Path:
    """The run that ``folder`` leads to, if it is the link; else ``folder``.

    A command follows the link once, at its beginning: another run may begin while it works.
    """
    return folder.resolve() if is_link(folder) else folder


def is_link(folder: Path) -> bool:
    """Whether ``folder`` is the link to the newest run."""
    return folder.name == NAME and folder.is_symlink()


def leads_through_link(folder: Path) -> bool:
    """Whether a new run in ``folder`` would be in the folder of the newest one."""
    return any(is_link(each) for each in (folder, *folder.parents))


def point_to(folder: Path) -> None:
    """Makes ``folder`` the newest run, if it is below a folder ``runs``. One that can't have the link is left as it is.

    A reader sees the old link or the new one. Of runs that begin at once, one is the newest. Nothing but a link is
    replaced.
    """
    folder = folder.absolute()
    runs = next((each for each in folder.parents[:_DEEPEST] if each.name == _RUNS), None)
    if runs is None:
        return
    link, partial = runs / NAME, runs / f".{NAME}.{uuid4().hex}"
    if link.exists() and not link.is_symlink():
        return
    with contextlib.suppress(OSError):  # a file system without links, or a folder that can't be written
        try:
            partial.symlink_to(folder.relative_to(runs))
            partial.replace(link)
        finally:
            partial.unlink(missing_ok=True)
