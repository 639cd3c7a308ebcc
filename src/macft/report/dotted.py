"""A nested configuration by dotted keys."""

from __future__ import annotations

from collections.abc import Mapping


def flat(config: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """``{"training.steps": 20}`` from ``{"training": {"steps": 20}}``."""
    values: dict[str, object] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values
