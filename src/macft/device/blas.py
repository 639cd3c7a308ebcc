"""Gives MLX's CPU backend on Linux a fast BLAS.

MLX's Linux wheel links the reference BLAS, about 60 times slower than OpenBLAS on the same core. The dynamic
linker resolves a symbol to the first library in the global scope that has it, so an OpenBLAS loaded with
``RTLD_GLOBAL`` before ``mlx.core`` takes over ``cblas_sgemm``. On macOS MLX uses Metal and Accelerate, and
nothing here does anything.

The OpenBLAS of the package index needs ``libgfortran.so.5``, which a bare machine lacks. mlx-cpu carries that very
library under a mangled name; a copy under its official name in the user cache satisfies the linker.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Matrix = NDArray[np.float32]

_WAITING = "OPENBLAS_THREAD_TIMEOUT"
_SHORTEST_WAIT = "4"
"""The base-2 logarithm of the clock cycles for which a BLAS thread without work is busy before it sleeps. With 26, as
OpenBLAS has it, such threads take the time of those that have work where other processes run too."""
_library: ctypes.CDLL | None = None
_problem: str | None = None


def preload() -> None:
    """Loads OpenBLAS into the global symbol scope, once. Never raises: without it MLX is slow, not broken."""
    global _library, _problem
    if _library is not None or platform.system() != "Linux":
        return
    if "mlx.core" in sys.modules:
        _problem = "mlx.core was imported before macft, so its slow reference BLAS stays in use"
        return
    os.environ.setdefault(_WAITING, _SHORTEST_WAIT)  # read as it is loaded
    try:
        _library = _load(_openblas_path())
        set_threads(available_cores())
    except OSError as error:
        _problem = f"OpenBLAS could not be loaded ({error}); MLX uses its slow reference BLAS"


def library() -> ctypes.CDLL | None:
    """The OpenBLAS that was loaded, if any."""
    return _library


def product(
    a: Matrix, b: Matrix, out: Matrix, *, transposed: bool = False, first_transposed: bool = False, add: bool = False
) -> None:
    """``out = a @ b`` (``b`` or ``a`` transposed), or ``out += ...``; float32 matrices whose rows are contiguous.

    Only where an OpenBLAS was loaded. (NumPy brings one of its own, whose threads would be in the way of this one's.)
    """
    assert _library is not None
    row_major, plain, turned = 101, 111, 112
    size = ctypes.c_int
    _library.cblas_sgemm(
        size(row_major),
        size(turned if first_transposed else plain),
        size(turned if transposed else plain),
        size(out.shape[0]),
        size(out.shape[1]),
        size(a.shape[0] if first_transposed else a.shape[1]),
        ctypes.c_float(1.0),
        ctypes.c_void_p(a.ctypes.data),
        size(a.strides[0] // 4),
        ctypes.c_void_p(b.ctypes.data),
        size(b.strides[0] // 4),
        ctypes.c_float(1.0 if add else 0.0),
        ctypes.c_void_p(out.ctypes.data),
        size(out.strides[0] // 4),
    )


def set_threads(count: int) -> None:
    """Limits BLAS to ``count`` threads. Does nothing where no OpenBLAS was loaded."""
    if _library is not None:
        _library.openblas_set_num_threads(ctypes.c_int(count))


def threads() -> int:
    """How many threads a product may use now; the cores where no OpenBLAS was loaded."""
    return available_cores() if _library is None else int(_library.openblas_get_num_threads())


def available_cores() -> int:
    """Cores this process may run on, as set by ``OPENBLAS_NUM_THREADS`` or the scheduler affinity."""
    if limit := os.environ.get("OPENBLAS_NUM_THREADS", ""):
        return max(1, int(limit)) if limit.isdigit() else 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe() -> str:
    """One line for the run header: which BLAS serves MLX's CPU backend, or why the fast one does not."""
    if platform.system() != "Linux":
        return "Accelerate"
    if _library is None:
        return _problem or "reference BLAS"
    config = _library.openblas_get_config
    config.restype = ctypes.c_char_p
    version = " ".join(config().decode().split()[:2])
    count = threads()
    return f"{version}, {count} thread{'' if count == 1 else 's'}"


def is_fast() -> bool:
    """Whether MLX's CPU matrix products go through an optimised BLAS."""
    return platform.system() != "Linux" or _library is not None


def _openblas_path() -> Path:
    """The packaged OpenBLAS, or the system's where no wheel exists for this processor."""
    spec = importlib.util.find_spec("ngsolve_openblas")
    if spec is not None and spec.submodule_search_locations:
        for folder in spec.submodule_search_locations:
            for path in sorted(Path(folder).glob("libopenblas*.so*")):
                return path
    return Path("libopenblas.so.0")


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        if "libgfortran.so.5" not in str(error):
            raise
    _load_gfortran()
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _load_gfortran() -> None:
    spec = importlib.util.find_spec("mlx")
    roots = list(spec.submodule_search_locations or []) if spec is not None else []
    for folder in (Path(root).parent / "mlx_cpu.libs" for root in roots):
        for bundled in folder.glob("libgfortran-*.so*"):
            for dependency in folder.glob("libquadmath-*.so*"):
                ctypes.CDLL(str(dependency), mode=ctypes.RTLD_GLOBAL)
            ctypes.CDLL(str(_with_official_soname(bundled)), mode=ctypes.RTLD_GLOBAL)
            return
    raise OSError("libgfortran.so.5 is missing; `apt install libgfortran5` or the like provides it")


def _with_official_soname(bundled: Path) -> Path:
    """A cached copy of ``bundled`` whose SONAME is ``libgfortran.so.5``: auditwheel's mangled name, cut short."""
    official = b"libgfortran.so.5"
    target = platformdirs.user_cache_path("macft") / "lib" / bundled.name / official.decode()
    if not target.exists():
        mangled = bundled.name.encode() + b"\0"
        patched = bundled.read_bytes().replace(mangled, official.ljust(len(mangled), b"\0"))
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        partial.write_bytes(patched)
        partial.replace(target)  # atomic, so that ranks starting together never see half a file
    return target
