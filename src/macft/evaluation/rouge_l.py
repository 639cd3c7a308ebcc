"""ROUGE-L: how much of the expected text's words an answer has, in their order.

The F-measure of the longest common subsequence of words (Lin 2004, "ROUGE: A Package for Automatic Evaluation of
Summaries", section 3.1, with beta = 1), as the package ``rouge-score`` computes it without stemming. That package is
not used: it needs nltk, had its last release in 2022, and drops all letters but a to z.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from macft.data.formats import Record

# Chinese and Japanese are written without spaces: each character is a word there.
_CHARACTERS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CHARACTERS}]|[^\W_{_CHARACTERS}]+")


class RougeL:
    """ROUGE-L of an answer, 0 to 1. Case and punctuation do not count."""

    def score(self, answer: str, expected: str, record: Record) -> float:  # noqa: ARG002
        """The F-measure; 0 where either text has no word."""
        found, wanted = _WORD.findall(answer.lower()), _WORD.findall(expected.lower())
        common = _longest_common(found, wanted)
        return 2 * common / (len(found) + len(wanted)) if common else 0.0


def _longest_common(left: Sequence[str], right: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    lengths = [0] * (len(right) + 1)
    for one in left:
        before = 0
        for index, other in enumerate(right, 1):
            above = lengths[index]
            lengths[index] = before + 1 if one == other else max(above, lengths[index - 1])
            before = above
    return lengths[-1]
