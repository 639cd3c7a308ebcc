"""The machine a process runs on: MLX's device, its BLAS, its memory, and the table of Mac chips."""
