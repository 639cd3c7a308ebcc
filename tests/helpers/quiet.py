"""Hours of the day in which a run is to be quiet, whenever the tests run."""

from __future__ import annotations

import time


def quiet_hours_now() -> str:
    """``thermal.quiet_hours`` that began an hour ago or earlier and last two hours or more."""
    hour = time.localtime().tm_hour
    return f"{(hour - 1) % 24:02d}:00-{(hour + 3) % 24:02d}:00"
