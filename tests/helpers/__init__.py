"""What several test files share."""

# Loads OpenBLAS, which has to happen before MLX is imported.
import macft  # noqa: F401
