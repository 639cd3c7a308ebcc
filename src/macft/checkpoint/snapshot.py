"""The complete state of a run at a step boundary, as bytes that travel to disk or to another node."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import msgpack
from mlx.utils import tree_flatten, tree_unflatten

from macft.errors import CheckpointError

ADAPTER, OPTIMIZER, PROGRESS = "adapters.safetensors", "optimizer.safetensors", "progress.json"
CODEC, OUTER = "codec.msgpack", "outer.msgpack"


@dataclass
class Progress:
    """Where a run stands. Data order, dropout and learning rate are functions of ``step``, so this is all there is."""

    # Optimizer updates made.
    step: int = 0
    # Target tokens of all global batches so far.
    target_tokens: int = 0
    # Training time so far in seconds, over all sittings.
    seconds: float = 0.0
    first_valid_loss: float | None = None
    valid_loss: float | None = None
    # The step whose adapter was validated last.
    evaluated_step: int | None = None
    best_valid_loss: float | None = None
    best_step: int | None = None
    # Validations in a row that brought no lower loss.
    stale_evaluations: int = 0
    # The dataset's metric before training: {"value": 0.05, "answers": [...]}.
    before: dict[str, Any] = field(default_factory=dict)

    def take_validation(self, loss: float) -> bool:
        """Keeps account of a validation after ``step``; returns whether no other had a lower loss, in nats."""
        self.valid_loss, self.evaluated_step = loss, self.step
        if self.first_valid_loss is None:
            self.first_valid_loss = loss
        is_best = self.best_valid_loss is None or loss < self.best_valid_loss
        if is_best:
            self.best_valid_loss, self.best_step, self.stale_evaluations = loss, self.step, 0
        else:
            self.stale_evaluations += 1
        return is_best

    @classmethod
    def from_json(cls, text: bytes) -> Progress:
        """Reads what :func:`capture` wrote; raises ValueError for anything else."""
        values = json.loads(text)
        names = {item.name for item in fields(cls)}
        if not isinstance(values, dict) or not isinstance(values.get("step"), int) or values.keys() - names:
            raise ValueError("not the progress of a run")
        return cls(**values)


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint's files by name."""

    files: dict[str, bytes]

    @property
    def progress(self) -> Progress:
        """The run's progress as stored."""
        return Progress.from_json(self.files[PROGRESS])

    @property
    def codec(self) -> list[bytes]:
        """The codecs' memories, by rank."""
        return self._blobs(CODEC)

    @property
    def outer(self) -> list[bytes]:
        """With DiLoCo the ranks' own optimizers, by rank."""
        return self._blobs(OUTER)

    def _blobs(self, name: str) -> list[bytes]:
        data = self.files.get(name, b"\x90")
        blobs: list[bytes] = msgpack.unpackb(data, max_bin_len=len(data))
        return blobs

    def pack(self) -> bytes:
        """For the wire: msgpack of the files."""
        packed: bytes = msgpack.packb(self.files)
        return packed

    @classmethod
    def unpack(cls, payload: bytes) -> Snapshot:
        """The inverse of :meth:`pack`; raises CheckpointError for anything else."""
        files = msgpack.unpackb(payload, max_bin_len=len(payload))
        if not isinstance(files, dict) or not {ADAPTER, OPTIMIZER, PROGRESS} <= files.keys():
            raise CheckpointError("the snapshot sent is incomplete; do all nodes run the same macft?")
        return cls(files)


def capture(
    model: nn.Module,
    optimizer: optim.Optimizer,
    progress: Progress,
    *,
    codec: Sequence[bytes] = (),
    outer: Sequence[bytes] = (),
) -> Snapshot:
    """Copies trainable parameters, optimizer state and progress.

    ``codec`` and ``outer`` are what each rank alone knows: its codec's memory, and with DiLoCo its own optimizer.
    """
    return Snapshot(
        {
            ADAPTER: pack_tensors(model.trainable_parameters()),
            OPTIMIZER: pack_tensors(optimizer.state),
            PROGRESS: json.dumps(asdict(progress)).encode(),
            CODEC: msgpack.packb(list(codec)),
            OUTER: msgpack.packb(list(outer)),
        }
    )


def restore(snapshot: Snapshot, model: nn.Module, optimizer: optim.Optimizer) -> Progress:
    """Puts a snapshot's state into ``model`` and ``optimizer``, bit for bit.

    Raises:
        CheckpointError: the adapter stored doesn't fit the adapter configured.
    """
    restore_adapter(snapshot, model)
    optimizer.state = tree_unflatten(list(unpack_tensors(snapshot.files[OPTIMIZER]).items()))
    mx.eval(optimizer.state)
    return snapshot.progress


def restore_adapter(snapshot: Snapshot, model: nn.Module) -> None:
    """Puts only the trainable parameters back."""
    stored = unpack_tensors(snapshot.files[ADAPTER])
    expected = dict(tree_flatten(model.trainable_parameters()))
    if {name: value.shape for name, value in stored.items()} != {name: v.shape for name, v in expected.items()}:
        raise CheckpointError(
            "the checkpoint holds another adapter than the one configured; "
            "resume with the adapter settings it was trained with"
        )
    model.update(tree_unflatten(list(stored.items())))
    mx.eval(model.trainable_parameters())


def digest(model: nn.Module) -> bytes:
    """SHA-256 over the trainable parameters' names and bits: equal on two ranks only if they hold the same adapter."""
    return hashlib.sha256(pack_tensors(model.trainable_parameters())).digest()


def pack_tensors(tree: Any) -> bytes:
    buffer = io.BytesIO()
    mx.save_safetensors(buffer, dict(sorted(tree_flatten(tree))))
    return buffer.getvalue()


def unpack_tensors(data: bytes) -> dict[str, Any]:
    arrays = mx.load(io.BytesIO(data), format="safetensors")
    assert isinstance(arrays, dict)
    return arrays
