"""What MLX computes on, as far as the way of computing depends on it."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Device:
    """``kind`` is "cpu", "metal" or "cuda". ``openblas``: products on the CPU go through a loaded OpenBLAS.

    ``cores`` are those of a CPU that this process may use.
    """

    kind: str
    openblas: bool = False
    cores: int = 1

    def shared_by(self, processes: int) -> Device:
        """What each of ``processes`` on this machine computes on."""
        return replace(self, cores=max(1, self.cores // processes))

    @classmethod
    def default(cls) -> Device:
        """MLX's default device in this process."""
        import mlx.core as mx  # slow to import, and a plan for other machines needs no device

        from macft.device import blas
        from macft.device.mlx_device import on_cpu

        if on_cpu():
            return cls("cpu", openblas=blas.library() is not None, cores=blas.available_cores())
        return cls("metal" if mx.metal.is_available() else "cuda")


METAL = Device("metal")
"""Any Mac's GPU."""
