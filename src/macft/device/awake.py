"""Keeps a Mac awake for a run."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess

_running: list[subprocess.Popen[bytes]] = []


def keep_awake() -> None:
    """While this process runs, a Mac does not fall asleep because nobody types; closing its lid still does that."""
    if platform.system() != "Darwin" or _running:
        return
    devnull = subprocess.DEVNULL
    command = ["caffeinate", "-i", "-w", str(os.getpid())]
    with contextlib.suppress(OSError):  # without that program the run goes on
        _running.append(subprocess.Popen(command, stdin=devnull, stdout=devnull, stderr=devnull))
