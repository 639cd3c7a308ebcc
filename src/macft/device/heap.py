"""Memory that the C library keeps for itself."""

from __future__ import annotations

import ctypes
import sys

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_LARGE = 1024 * 1024


def return_large_arrays() -> None:
    """From now on arrays of a megabyte and more are given back to the system when they are freed.

    glibc keeps freed arrays of up to 32 MB for later ones (the dynamic threshold of mallopt(3)). Where the weights of
    blocks come and go, that added up to 70 MB. Getting each array from the system takes time, so this is for runs that
    need most of what they may take. MLX on a CPU and NumPy allocate there.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, _LARGE)
