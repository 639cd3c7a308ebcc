"""Exact match: the same text, except for white space."""

from __future__ import annotations

from macft.data.formats import Record


class ExactMatch:
    """Right if the answer is the expected text, where any run of white space counts as one space."""

    def score(self, answer: str, expected: str, record: Record) -> bool:  # noqa: ARG002
        """Whether both texts have the same words."""
        return answer.split() == expected.split()
