"""Runs tools of the operating system, which may not exist."""

from __future__ import annotations

import subprocess

_MAX_CHARACTERS = 4_000_000


def output_of(*command: str, timeout: float = 10.0) -> str | None:
    """Standard output of ``command``; None if it does not exist, fails or takes longer than ``timeout`` seconds."""
    try:
        completed = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return completed.stdout[:_MAX_CHARACTERS] if completed.returncode == 0 else None
