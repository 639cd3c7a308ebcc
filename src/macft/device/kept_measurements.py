"""What was measured of this machine and is kept for plans: small JSON files in macft's cache folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import platformdirs


def cache_folder() -> Path:
    """Where they are kept, unless a caller says otherwise."""
    return platformdirs.user_cache_path("macft")


def read_kept(path: Path, *, longest: int) -> dict[str, Any]:
    """The content of a file; empty where there is none, or it is longer than ``longest`` bytes, or no JSON object."""
    try:
        if path.stat().st_size > longest:
            return {}
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
