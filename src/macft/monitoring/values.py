"""Values of a line of metrics.jsonl, which any program may have written."""

from __future__ import annotations

import math
from collections.abc import Mapping

Line = Mapping[str, object]

_LONGEST_TEXT = 500
_MOST_ITEMS = 256


def number(value: object) -> float | None:
    """``value`` as a finite number; None if it is none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        converted = float(value)
    except OverflowError:
        return None
    return converted if math.isfinite(converted) else None


def count(value: object) -> int:
    """``value`` as a whole number of 0 or more; 0 if it is none."""
    return max(0, int(number(value) or 0))


def text(value: object) -> str:
    """``value`` as one line without control characters; empty if it is no text."""
    if not isinstance(value, str):
        return ""
    line = " ".join(value[: 4 * _LONGEST_TEXT].split())
    line = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line)
    return line if len(line) <= _LONGEST_TEXT else f"{line[:_LONGEST_TEXT]} ..."


def items(value: object) -> list[object]:
    """``value`` as a list; empty if it is none."""
    return value[:_MOST_ITEMS] if isinstance(value, list) else []


def mapping(value: object) -> Line:
    """``value`` as a mapping; empty if it is none."""
    return value if isinstance(value, dict) else {}
