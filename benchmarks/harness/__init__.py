"""What tests and benchmarks share: training runs as processes, a tiny model, network namespaces, fault injection."""

# Loads OpenBLAS, which has to happen before MLX is imported.
import macft  # noqa: F401
