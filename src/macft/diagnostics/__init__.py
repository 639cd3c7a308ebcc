"""What ``python -m macft.doctor`` looks at; each check returns findings."""

from __future__ import annotations

from dataclasses import dataclass

LEVELS = ("ok", "warning", "problem")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Attributes:
        topic: What was looked at, one or two words.
        level: One of :data:`LEVELS`.
        text: What was found.
        mend: The command that mends it, or what to do; empty if all is well.
    """

    topic: str
    level: str
    text: str
    mend: str = ""
