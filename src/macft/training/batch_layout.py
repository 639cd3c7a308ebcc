"""What of a micro-batch is computed at once: its rows padded, or laid end to end in packs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from macft.data.batch import Batch, pack, widened, widened_pack
from macft.model.execution import Execution
from macft.model.packing import Layout, packed
from macft.training.loss import target_positions

_TOKENS_AT_ONCE = 512
"""Tokens in a pack on a CPU, where longer ones are no faster and take more memory."""


@dataclass(frozen=True)
class DeviceBatch:
    """Rows that are computed at once, padded or, where there is a ``layout``, laid end to end.

    ``layout`` holds paths, owners and depths of the pack, ``lengths`` those of its rows; see Pack.
    """

    inputs: NDArray[np.int32]
    positions: NDArray[np.int32]
    targets: NDArray[np.int32]
    weights: NDArray[np.float32]
    row_ids: NDArray[np.int64]
    layout: tuple[NDArray[np.int32], ...] = ()
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class BatchLayout:
    """How micro-batches are divided into parts.

    ``packs``: rows are laid end to end, and with ``shares`` what they begin with in common is there once; else they are
    padded. ``compiled``: sizes are rounded up, so that few shapes occur. ``cpu``: packs are short.
    """

    packs: bool = False
    shares: bool = False
    compiled: bool = False
    cpu: bool = False

    @classmethod
    def from_execution(cls, execution: Execution) -> BatchLayout:
        """That of the training steps."""
        return cls(execution.packing, execution.shared_prefixes, execution.compiled, execution.pack_tokens is not None)

    @property
    def most_tokens(self) -> int | None:
        """Tokens in a part of more than one row at most; None: as many as the micro-batch has."""
        return _TOKENS_AT_ONCE if self.packs and self.cpu else None

    def parts(self, batch: Batch) -> Iterator[DeviceBatch]:
        """``batch``, part by part; packs have no rows without a target."""
        if self.packs:
            for item in pack(batch, self.most_tokens, shared=self.shares):
                item = widened_pack(item) if self.compiled else item
                layout = item.paths, item.owners, item.depths
                yield DeviceBatch(
                    item.inputs, item.positions, item.targets, item.weights, item.row_ids, layout, item.lengths
                )
            return
        batch = widened(batch) if self.compiled else batch
        yield DeviceBatch(batch.tokens[:, :-1], *target_positions(batch, coarse=self.compiled), batch.row_ids)


def laid_out(layout: Sequence[Any], lengths: Sequence[int] = ()) -> AbstractContextManager[None]:
    """Inside, this thread's sequences are those of a part with this layout, as MLX arrays; () for padded rows."""
    if not layout:
        return packed(None)
    paths, owners, depths = layout
    return packed(Layout(paths, owners, depths, lengths))
