"""Kernel backends: how a model's operations are computed, its loss and its gradient.

``mlx`` is the portable path, MLX operations only: what Metal and CUDA run. ``cpu`` computes in NumPy and OpenBLAS.
"""
