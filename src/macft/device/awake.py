"""Keeps a Mac awake for a run."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess


def keep_awake() -> None:
    """While this process runs, a Mac does not fall asleep because nobody types; closing its lid still does that."""
    if platform.system() != "Darwin":
        return
    devnull = subprocess.DEVNULL
    with contextlib.suppress(OSError):  # without that program the run goes on
        subprocess.Popen(["caffeinate", "-i", "-w", str(os.getpid())], stdin=devnull, stdout=devnull, stderr=devnull)
