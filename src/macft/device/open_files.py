"""The limit of open files, which mlx-lm sets when it is imported."""

from __future__ import annotations

import resource

_OF_MLX_LM = 4096
"""mlx-lm's hard limit. It asks for it without looking at the one there is."""


def allow_low_limit() -> None:
    """Lets mlx-lm be imported where the hard limit is lower than the one it sets: that would be an error."""
    if not 0 <= resource.getrlimit(resource.RLIMIT_NOFILE)[1] < _OF_MLX_LM:
        return
    set_limit = resource.setrlimit

    def set_up_to_hard_limit(kind: int, limits: tuple[int, int]) -> None:
        _, hard = resource.getrlimit(kind)
        if kind == resource.RLIMIT_NOFILE and hard >= 0:
            limits = (min(limits[0], hard), min(limits[1], hard))
        set_limit(kind, limits)

    resource.setrlimit = set_up_to_hard_limit
