"""How fast this machine reads its memory."""

from __future__ import annotations

import time

import numpy as np

from macft.device.chips import own_chip

_VALUES, _PASSES = 16 << 20, 3


def memory_speed() -> float:
    """Bytes a second: that of the chip's table; of other machines it is measured, with 64 MiB, in some hundredths s."""
    chip = own_chip()
    if chip is not None:
        return chip.bandwidth * 1e9
    values, best = np.ones(_VALUES, np.float32), 0.0
    for _ in range(_PASSES):
        started = time.perf_counter()
        values.max()
        best = max(best, values.nbytes / (time.perf_counter() - started))
    return best
