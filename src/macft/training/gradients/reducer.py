"""The sum of gradients over the ranks: the codec, its error memory in checkpoints, and ``collective.codec=auto``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import msgpack
import numpy as np
from numpy.typing import NDArray

from macft.collective.base import Collective
from macft.collective.codecs.choose import choose, make
from macft.errors import CheckpointError
from macft.training.gradients.buckets import Piece

_WARM_STEPS, _MEASURED_STEPS = 2, 3


class GradientReducer:
    """Sums buckets of gradients over the ranks of ``collective`` with the codec ``name``.

    ``name`` is the value of ``collective.codec``. With ``auto`` the first steps are exact; then rank 0 chooses a codec
    for all ranks, from what it has measured.
    """

    def __init__(self, collective: Collective, name: str = "none", powersgd_rank: int = 1):
        self.collective = collective
        self._powersgd_rank = powersgd_rank
        self._codec = make(name, powersgd_rank)
        self._is_open = name == "auto" and collective.world_size > 1
        self._seen: list[tuple[float, float]] = []

    @property
    def codec(self) -> str:
        """The name of the codec in use."""
        return self._codec.name

    @property
    def residual_norm(self) -> float:
        """L2 norm of this rank's error memory: what its codec has rounded away and still has to add."""
        errors = [value for name, value in self._codec.state().items() if not name.startswith("q/")]
        return math.sqrt(sum(float(np.vdot(error, error)) for error in errors))

    def all_reduce(self, names: Sequence[str], arrays: Sequence[mx.array | NDArray[np.float32]]) -> None:
        """Sums ``arrays`` of any shape, a bucket with these ``names``, in place; raises as the collective does."""
        self._codec.all_reduce(self.collective, names, arrays)

    def all_reduce_pieces(self, bucket: Sequence[Piece], arrays: Sequence[mx.array]) -> None:
        """Sums the ``arrays`` of a bucket's pieces in place, where they lie; raises as the collective does."""
        named = {piece.name: array for piece, array in zip(bucket, arrays, strict=True)}
        if not self._codec.needs_matrices:
            self.all_reduce(list(named), list(named.values()))
            return
        views = {name: view for piece in bucket for name, view in piece.views(named[piece.name]).items()}
        self.all_reduce(list(views), list(views.values()))

    def observe(self, step_seconds: float, exposed_seconds: float) -> str:
        """Takes a step's seconds, ``exposed_seconds`` of them for communication; returns a line once a codec is chosen.

        Collective, every rank must call it: they choose at the same step.
        """
        if not self._is_open:
            return ""
        self._seen.append((step_seconds, exposed_seconds))
        if len(self._seen) < _WARM_STEPS + _MEASURED_STEPS:
            return ""
        self._is_open = False
        steps, exposed = np.median(np.array(self._seen[_WARM_STEPS:]), axis=0)
        name, reason = choose(float(steps), float(exposed))
        name, reason = self.collective.broadcast(f"{name}\n{reason}".encode()).decode().split("\n", 1)
        self._codec = make(name, self._powersgd_rank)
        return f"collective.codec=auto: {reason}"

    def agreed(self) -> tuple[str, bool]:
        """What all ranks have alike: the codec's name, and whether ``auto`` still has to choose."""
        return self._codec.name, self._is_open

    def start_anew(self, name: str, *, is_open: bool) -> None:
        """Restarts with the codec ``name`` and no error memory: the ranks have changed, or a sum was interrupted."""
        self._codec, self._is_open, self._seen = make(name, self._powersgd_rank), is_open, []

    def capture(self) -> list[bytes]:
        """Every rank's error memory, for a checkpoint. Collective: every rank must call it."""
        if self.codec == "none" and not self._is_open:
            return [msgpack.packb({"codec": "none", "open": False, "arrays": {}})]
        arrays = {name: [list(value.shape), value.tobytes()] for name, value in self._codec.state().items()}
        own: bytes = msgpack.packb({"codec": self.codec, "open": self._is_open, "arrays": arrays})
        return self.collective.all_gather(own)

    def restore(self, blobs: Sequence[bytes]) -> None:
        """Restores what :meth:`capture` returned, on the same number of ranks or another.

        Raises:
            CheckpointError: ``blobs`` are damaged.
        """
        try:
            states = [msgpack.unpackb(blob, max_bin_len=len(blob)) for blob in blobs]
            arrays = [
                {
                    name: np.frombuffer(data, np.float32).reshape(shape).copy()
                    for name, (shape, data) in state["arrays"].items()
                }
                for state in states
            ]
            name, self._is_open = str(states[0]["codec"]), self._is_open and bool(states[0]["open"])
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, msgpack.UnpackException):
            raise CheckpointError("the checkpoint's codec memory is damaged") from None
        self._codec = make(name, self._powersgd_rank)
        self._load(arrays)

    def _load(self, states: list[dict[str, NDArray[np.float32]]]) -> None:
        self._codec.load(states, self.collective.rank, self.collective.world_size)
