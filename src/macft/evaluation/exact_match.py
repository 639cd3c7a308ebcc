"""Exact match: the same text, except for white space."""

from __future__ import annotations

from macft.data.formats import Record
from macft.evaluation.record import expected_text


class ExactMatch:
    """Right if the answer is the expected text, where any run of white space counts as one space."""

    def score(self, record: Record, generated: str) -> bool:
        """Whether ``generated`` equals the record's answer."""
        return generated.split() == expected_text(record).split()
