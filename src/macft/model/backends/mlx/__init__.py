"""The portable backend: MLX operations only, as Metal and CUDA run them."""
