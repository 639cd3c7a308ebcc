"""Kernels for MLX's CPU backend on Linux: NumPy and OpenBLAS."""
