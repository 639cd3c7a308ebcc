"""How the ranks talk to each other: the Hydra group ``collective``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class CollectiveConfig:
    """The Hydra group ``collective``."""

    # The only backend so far: a ring over ZeroMQ.
    backend: str = "ring"
    # Seconds after which a peer that gives no sign of life at all counts as lost.
    timeout: float = 30.0
    # Seconds to wait for a peer that is alive but doesn't send, because it still computes for instance.
    patience: float = 600.0
    # Large arrays travel in pieces of this many bytes, so that adding overlaps with sending.
    piece_bytes: int = 1048576


def problems(config: CollectiveConfig) -> list[str]:
    """One line for each value that can't be right; no I/O."""
    found = []
    if config.backend != "ring":
        found.append(f"collective.backend: '{config.backend}' is not available; there is ring")
    if not config.timeout >= 1.0:
        found.append(f"collective.timeout: {config.timeout} must be 1 second or more")
    if not config.patience >= config.timeout:
        found.append(f"collective.patience: {config.patience} must be at least collective.timeout ({config.timeout})")
    if not 4096 <= config.piece_bytes <= 2**28:
        found.append(f"collective.piece_bytes: {config.piece_bytes} is not from 4096 to {2**28}")
    return found
