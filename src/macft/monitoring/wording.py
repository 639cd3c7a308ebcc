"""Numbers of a run's facts as people read them at a terminal."""

from __future__ import annotations


def shown(value: float | None, form: str, missing: str = "-") -> str:
    """``value`` in a format such as ``{:.1f} C``."""
    return missing if value is None else form.format(value)


def gigabytes(size: float | None) -> str:
    """Bytes in GB, with as many digits as matter."""
    if size is None:
        return "-"
    return f"{size / 1e9:.2f}" if size < 1e10 else f"{size / 1e9:.0f}"


def link_speed(bytes_per_second: float | None) -> str:
    """Bytes a second in Gbit/s or Mbit/s."""
    if bytes_per_second is None:
        return "-"
    megabits = bytes_per_second * 8e-6
    return f"{megabits / 1000:.1f} Gbit/s" if megabits >= 1000 else f"{megabits:.0f} Mbit/s"


def status_line(status: str) -> str:
    """A run's status in words."""
    return {"early_stopped": "stopped early", "waiting": "no step yet"}.get(status, status)
