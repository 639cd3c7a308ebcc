"""Finds a model on this machine, without network access."""

from __future__ import annotations

from pathlib import Path

import platformdirs

from macft.model.fetch.bundled import BUNDLED


def find_local(name: str) -> Path | None:
    """The folder of a bundled model, a local folder, or a Hugging Face id in the cache; None if there is none."""
    if name in BUNDLED:
        folder = platformdirs.user_cache_path("macft") / "models" / name
        return folder if folder.is_dir() else None
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None
