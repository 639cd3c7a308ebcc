"""Waits for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable

_SECONDS = 60.0


def wait_until(condition: Callable[[], object]) -> None:
    """Waits until ``condition()`` is true. Raises AssertionError after a minute."""
    deadline = time.monotonic() + _SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)
