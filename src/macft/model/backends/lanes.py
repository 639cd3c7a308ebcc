"""Parts of a batch one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import mlx.nn as nn

from macft.model.backends.base import Item, Result


class OneLane:
    """See :class:`~macft.model.backends.base.Lanes`. The caller's thread computes, with all of the device."""

    def __init__(self, model: nn.Module):
        self.models: Sequence[nn.Module] = [model]

    def map(self, function: Callable[[int, Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """See :class:`~macft.model.backends.base.Lanes`."""
        return (function(0, item) for item in items)
