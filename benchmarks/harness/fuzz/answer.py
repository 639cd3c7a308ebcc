"""What a target under attack answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

SECONDS = 60.0
"""What takes longer hangs."""


@dataclass
class Answer:
    """What a target answers.

    Attributes:
        addresses: Where it listens now.
        valid: Valid frames for it, in hexadecimal.
        server: The public key of an encrypted port; empty without encryption.
        keys: Public and secret keys that the port lets in: those of a machine that takes part.
        wrong: What was not as it must be; empty if nothing.
        done: How often the work has been done so far.
        notes: What was told to the user in passing, by how often.
    """

    addresses: list[str] = field(default_factory=list)
    valid: list[str] = field(default_factory=list)
    server: str = ""
    keys: list[tuple[str, str]] = field(default_factory=list)
    wrong: str = ""
    done: int = 0
    notes: dict[str, int] = field(default_factory=dict)


class Target(Protocol):
    """A port at work."""

    def open(self) -> Answer:
        """Where it listens, and what valid frames look like."""
        ...

    def check(self) -> Answer:
        """Does the port's work once."""
        ...


def wait_for(condition: Callable[[], bool]) -> bool:
    """Whether ``condition`` has become true within :data:`SECONDS`."""
    deadline = time.monotonic() + SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()
