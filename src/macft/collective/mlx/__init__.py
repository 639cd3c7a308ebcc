"""MLX's own communication: a group of ranks, the collective over it, and the health of its ranks."""
