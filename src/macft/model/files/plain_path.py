"""Paths for code that takes them as patterns of file names."""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def plain_path(folder: Path) -> Iterator[Path]:
    """A path of ``folder`` without ``[``, ``*`` and ``?``, which mlx-lm gives to ``glob``: if need be a link to it."""
    if glob.escape(str(folder)) == str(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="macft-") as links:
        link = Path(links) / "model"
        link.symlink_to(folder.absolute(), target_is_directory=True)
        yield link
