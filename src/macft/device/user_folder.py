"""The folder in which macft keeps what belongs to this user on this machine."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def user_config_folder() -> Path:
    """This user's clusters, own Hydra groups, and keys; the variable ``MACFT_CONFIG`` names another folder."""
    override = os.environ.get("MACFT_CONFIG")
    return Path(override).expanduser().absolute() if override else platformdirs.user_config_path("macft")
