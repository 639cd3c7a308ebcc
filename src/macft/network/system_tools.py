"""Runs the system's own tools, which may be absent."""

from __future__ import annotations

import subprocess

_MAX_CHARACTERS = 4_000_000


def output_of(*command: str, timeout: float = 10.0) -> str | None:
    """Standard output of ``command``; None if it is not there, fails or takes longer than ``timeout`` seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout[:_MAX_CHARACTERS] if done.returncode == 0 else None
