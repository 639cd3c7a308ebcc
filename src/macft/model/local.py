"""Where a model is on this machine, without asking anybody."""

from __future__ import annotations

from pathlib import Path

import platformdirs

from macft.model.bundled import BUNDLED


def find_local(name: str) -> Path | None:
    """The folder of a bundled model, a local folder, or a Hugging Face id in the cache; None if it is not here."""
    if name in BUNDLED:
        folder = platformdirs.user_cache_path("macft") / "models" / name
        return folder if folder.is_dir() else None
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None
