"""Linux network namespaces as machines."""

from __future__ import annotations

import itertools
import os
import shutil
import string
import subprocess
import sys
from collections.abc import Sequence

_LETTERS = itertools.cycle(string.ascii_lowercase)


def run(command: str) -> str:
    """Runs ``command``, split at spaces; returns its output. Raises RuntimeError with its errors if it fails."""
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr.strip()}")
    return done.stdout


def unique_tag() -> str:
    """Up to six characters for names of namespaces and interfaces, others than those of an earlier call."""
    return f"{os.getpid() % 100_000}{next(_LETTERS)}"


def missing_requirement(commands: Sequence[str] = ()) -> str:
    """Why namespaces, or one of ``commands``, can't be used here; empty if all can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    search = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    if missing := [name for name in ("ip", *commands) if shutil.which(name, path=search) is None]:
        return f"{missing[0]} is not installed"
    name = f"mt{unique_tag()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "network namespaces are not permitted here"
    run(f"ip netns del {name}")
    return ""
