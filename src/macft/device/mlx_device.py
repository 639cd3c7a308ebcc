"""Prepares MLX's default device for training and describes it."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from macft.device import blas, heap

_LEAST_CACHE = 256 * 1024 * 1024
_CPU_CACHE = 32 * 1024 * 1024
_TIGHT = 0.5


def on_cpu() -> bool:
    """Whether MLX computes on the CPU, where only float32 matrix products are fast."""
    return bool(mx.default_device() == mx.cpu)


def start(arrays: Sequence[mx.array]) -> None:
    """Has ``arrays`` computed, and doesn't wait for it."""
    mx.async_eval(arrays)  # type: ignore[no-untyped-call]


def prepare_device() -> str:
    """Sets up MLX's default device, once per process, and returns a line that describes it.

    On Metal the wired limit becomes the recommended size, as in mlx-lm. On the CPU ``mx.compile`` is turned
    off where its compiler fails.
    """
    info = mx.device_info()
    name = str(info.get("device_name", "unknown device"))
    if on_cpu():
        fused = "" if _compiles() else ", mx.compile off (the C++ compiler it needs fails)"
        return f"{name}, CPU, float32 through {blas.describe()}{fused}"
    memory = f", {int(info['memory_size']) / 2**30:.0f} GiB" if "memory_size" in info else ""
    if not mx.metal.is_available():
        return f"{name}, CUDA{memory}"
    if limit := info.get("max_recommended_working_set_size"):
        mx.set_wired_limit(int(limit))
    return f"{name}, Metal{memory}"


def keep_within(budget: float, expected_peak: float) -> None:
    """Holds MLX's buffer cache to what a run of ``expected_peak`` bytes leaves of its ``budget``, in bytes.

    Packs of rows have many shapes, so freed buffers of odd sizes pile up in the cache unless it has a limit. MLX waits
    for running work, rather than take more, from the budget on. On a CPU the cache has MLX's own limit, 32 MiB, at
    most: a larger one made no step faster. There the C library keeps nothing, where the run needs most of its budget.
    """
    if on_cpu():
        if expected_peak > _TIGHT * budget:
            heap.return_large_arrays()
        mx.set_cache_limit(int(min(_CPU_CACHE, max(0.0, budget - expected_peak))))
        return
    mx.set_memory_limit(int(budget))
    mx.set_cache_limit(max(int(budget - expected_peak), _LEAST_CACHE))


def _compiles() -> bool:
    """Tries ``mx.compile`` on the CPU, and turns it off if it fails.

    MLX itself does without where there is no ``g++``, but raises in the middle of a step where ``g++`` can't
    compile or the folder for temporary files can't be written. The trial takes half a second the first time;
    MLX keeps what it compiled.
    """
    try:
        mx.eval(mx.compile(lambda x: mx.exp(x) + 1)(mx.zeros(1)))
    except RuntimeError:
        mx.disable_compile()
        return False
    return True
