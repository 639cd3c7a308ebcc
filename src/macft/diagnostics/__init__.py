"""The checks of ``python -m macft.doctor``; each returns findings."""

from __future__ import annotations

from dataclasses import dataclass

LEVELS = ("ok", "warning", "problem")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Attributes:
        topic: What was checked, one or two words.
        level: One of :data:`LEVELS`.
        text: The result.
        mend: The command that fixes it, or what to do; empty if there is no problem. The name is a key of the JSON
            report.
    """

    topic: str
    level: str
    text: str
    mend: str = ""
