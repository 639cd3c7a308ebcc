"""What of a micro-batch is computed at once: its rows padded, or laid end to end in packs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from macft.data.batch import Batch, pack, pad_pack_to_bucket, pad_to_bucket, split_rows
from macft.model.execution import Execution
from macft.model.packing import PackLayout
from macft.training.targets import target_positions


@dataclass(frozen=True)
class DeviceBatch:
    """Rows that are computed at once, padded or, where there is a ``layout``, laid end to end.

    ``layout`` holds paths, owners and depths of the pack, ``lengths`` those of its rows; see Pack.
    """

    # (rows, length), or (1, tokens) in a pack.
    inputs: NDArray[np.int32]
    # (n,): flat indices into the inputs, tokens and weights of the targets.
    positions: NDArray[np.int32]
    targets: NDArray[np.int32]
    weights: NDArray[np.float32]
    # (rows,)
    row_ids: NDArray[np.int64]
    layout: tuple[NDArray[np.int32], ...] = ()
    lengths: tuple[int, ...] = ()

    def loss_inputs(self) -> list[mx.array]:
        """Inputs (rows, length), positions, targets and weights (n,), as the loss takes them."""
        return [mx.array(values) for values in (self.inputs, self.positions, self.targets, self.weights)]

    def pack_layout(self) -> PackLayout | None:
        """Where the rows are; None where they are padded."""
        return pack_layout([mx.array(values) for values in self.layout], self.lengths)


@dataclass(frozen=True)
class BatchLayout:
    """How micro-batches are divided into parts.

    ``packing``: rows are laid end to end, and with ``shared_prefixes`` what they begin with in common is there once;
    else they are padded. ``compiled``: sizes are rounded up, so that few shapes occur. ``pack_tokens``: most tokens in
    a pack of several rows; None: as many as the micro-batch has. ``lanes``: parts that are computed at the same time.
    """

    packing: bool = False
    shared_prefixes: bool = False
    compiled: bool = False
    pack_tokens: int | None = None
    lanes: int = 1

    @classmethod
    def from_execution(cls, execution: Execution) -> BatchLayout:
        """That of the training steps."""
        return cls(
            execution.packing, execution.shared_prefixes, execution.compiled, execution.pack_tokens, execution.lanes
        )

    @classmethod
    def for_validation(cls, execution: Execution) -> BatchLayout:
        """That of validation, which isn't compiled and has no dropout, so that all common beginnings are shared."""
        return cls(execution.packing, execution.packing, False, execution.pack_tokens, execution.lanes)

    @property
    def max_tokens(self) -> int | None:
        """Most tokens in a part of several rows; None: as many as the micro-batch has."""
        return self.pack_tokens if self.packing else None

    def parts(self, batch: Batch) -> Iterator[DeviceBatch]:
        """``batch``, part by part; packs have no rows without a target.

        A pure function of the rows, so that the sum over parts has the same bits on each run.
        """
        if self.packing:
            for item in pack(batch, self.max_tokens, shared=self.shared_prefixes, lanes=self.lanes):
                item = pad_pack_to_bucket(item) if self.compiled else item
                layout = item.paths, item.owners, item.depths
                yield DeviceBatch(
                    item.inputs, item.positions, item.targets, item.weights, item.row_ids, layout, item.lengths
                )
            return
        batch = pad_to_bucket(batch) if self.compiled else batch
        for part in split_rows(batch, self.lanes):
            yield DeviceBatch(part.tokens[:, :-1], *target_positions(part, coarse=self.compiled), part.row_ids)


def pack_layout(layout: Sequence[mx.array], lengths: Sequence[int] = ()) -> PackLayout | None:
    """The layout of a pack from paths (rows, length), owners and depths (tokens,); None for rows that are padded."""
    if not layout:
        return None
    paths, owners, depths = layout
    return PackLayout(paths, owners, depths, lengths)
