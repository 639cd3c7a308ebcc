"""What a request may ask of sampling: values that mlx-lm takes, and fails on when it chooses a token.

A failure there would end the server, or the machines of a cluster one after the other.
"""

from __future__ import annotations

import math
from typing import Any

_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "xtc_probability",
    "xtc_threshold",
)
_HIGHEST_THRESHOLD = 0.5
_SEEDS = 2**64


def settle(handler: Any, vocabulary: int) -> str:
    """What is wrong with the parameters of ``handler``, a request to a model of this many tokens; empty if nothing is.

    A seed is taken modulo 2**64, and a ``top_k`` of all tokens or more is none.
    """
    for name in _NUMBERS:
        if not _is_finite(getattr(handler, name)):
            return f"{name} must be a finite number"
    if handler.xtc_threshold > _HIGHEST_THRESHOLD:
        return f"xtc_threshold must be at most {_HIGHEST_THRESHOLD}"
    for token, bias in (handler.logit_bias or {}).items():
        if not 0 <= token < vocabulary:
            return f"logit_bias: there is no token {str(token)[:40]}; they are numbered from 0 to {vocabulary - 1}"
        if not _is_finite(bias):
            return f"logit_bias of token {token} must be a finite number"
    if handler.seed is not None:
        handler.seed %= _SEEDS
    if handler.top_k >= vocabulary:
        handler.top_k = 0
    return ""


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that no float can be
        return False
