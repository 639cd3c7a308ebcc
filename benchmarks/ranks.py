"""Ranks of a benchmark as processes that are told things, and answer, in lines of JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


def start(arguments: Sequence[str], prefixes: Sequence[Sequence[str]]) -> list[subprocess.Popen[str]]:
    """A Python process with ``arguments`` and its rank for each of ``prefixes``, the words before its command."""
    return [
        subprocess.Popen(
            [*prefix, sys.executable, *arguments, str(rank)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for rank, prefix in enumerate(prefixes)
    ]


def tell(process: subprocess.Popen[str], what: Any) -> None:
    """The process reads it with ``json.loads(input())``."""
    assert process.stdin is not None
    process.stdin.write(json.dumps(what) + "\n")
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> Any:
    """What the process prints next."""
    assert process.stdout is not None
    return json.loads(process.stdout.readline())
