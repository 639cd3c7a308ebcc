"""Losses whose sums have the same bits in any order; see :mod:`macft.training.gradients.exact_sums`."""

from __future__ import annotations

_STEP = 2.0**-20
_LIMIT = 2.0**32


def exact_loss(loss: float) -> float:
    """``loss`` of a part, rounded to a multiple of 2^-20: sums of some of them are exact in float64."""
    return round(loss / _STEP) * _STEP if abs(loss) < _LIMIT else loss
