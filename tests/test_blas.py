"""OpenBLAS stands in for MLX's reference BLAS on Linux, and its absence is said, not raised."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64", reason="OpenBLAS is packaged for Linux on x86-64"
)


def python(code: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": "", "HOME": "/tmp", **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_macft_loads_openblas_before_mlx() -> None:
    code = "import macft, mlx.core; from macft import blas; print(blas.describe())"
    assert python(code).startswith("OpenBLAS")


def test_matrix_products_go_through_it() -> None:
    """The symbol that MLX calls is OpenBLAS's: its address is the same in the global scope and in the library."""
    code = (
        "import ctypes, macft, mlx.core; from macft import blas\n"
        "world = ctypes.CDLL(None)\n"
        "address = lambda lib: ctypes.cast(lib.cblas_sgemm, ctypes.c_void_p).value\n"
        "print(address(world) == address(blas._library))"
    )
    assert python(code) == "True"


def test_the_thread_limit_is_kept() -> None:
    code = "import macft; from macft import blas; print(blas.describe())"
    assert python(code, OPENBLAS_NUM_THREADS="1").endswith("1 thread")


def test_an_mlx_imported_first_is_noticed() -> None:
    code = "import mlx.core, macft; from macft import blas; print(blas.is_fast(), blas.describe())"
    assert python(code).startswith("False mlx.core was imported before macft")


def test_a_missing_openblas_is_slow_not_broken() -> None:
    code = (
        "import sys; sys.modules['ngsolve_openblas'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'ngsolve_openblas' else find(name, *a)\n"
        "import macft; from macft import blas; import mlx.core as mx\n"
        "print((mx.ones((3, 3)) @ mx.ones((3, 3))).sum().item(), blas.describe())"
    )
    assert python(code).startswith("27.0 ")


def test_threads_without_work_take_no_time_from_other_processes() -> None:
    """Two runs on one machine: as OpenBLAS has it, an idle thread stays busy for 2^26 cycles after each product."""
    code = (
        "import time, macft, mlx.core as mx; from macft import blas\n"
        "blas.set_threads(2)\n"
        "ones, spent = mx.ones((512, 512)), 0.0\n"
        "for _ in range(20):\n"
        "    mx.eval(ones @ ones)\n"
        "    before = time.process_time()\n"
        "    time.sleep(0.03)\n"
        "    spent += time.process_time() - before\n"
        "print(spent)"
    )
    assert float(python(code)) < 0.02  # seconds of processor time; with 2^26 cycles 0.1 to 0.5
