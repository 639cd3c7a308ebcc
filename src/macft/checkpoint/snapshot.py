"""The complete state of a run between two steps, as bytes to be stored or sent to another node."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import msgpack
from mlx.utils import tree_flatten, tree_unflatten

from macft.checkpoint.tensors import pack_tensors, unpack_tensors
from macft.errors import CheckpointError

log = logging.getLogger("macft.checkpoint")
ADAPTER, OPTIMIZER, PROGRESS = "adapters.safetensors", "optimizer.safetensors", "progress.json"
CODEC, OUTER = "codec.msgpack", "outer.msgpack"


@dataclass
class Progress:
    """How far a run is. Data order, dropout and learning rate are functions of ``step``, so nothing else is needed."""

    # Optimizer updates made.
    step: int = 0
    # Target tokens of all global batches so far.
    target_tokens: int = 0
    # Training time so far in seconds, over all starts of the run.
    seconds: float = 0.0
    first_valid_loss: float | None = None
    valid_loss: float | None = None
    # The step of the last validation.
    evaluated_step: int | None = None
    best_valid_loss: float | None = None
    best_step: int | None = None
    # Validations in a row without a lower loss.
    stale_evaluations: int = 0
    # The dataset's metric before training: {"value": 0.05, "answers": [...]}.
    before: dict[str, Any] = field(default_factory=dict)

    def take_validation(self, loss: float) -> bool:
        """Records a validation after ``step``; returns whether its ``loss``, in nats, is the lowest so far."""
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
        """The codecs' error memories, by rank."""
        return self._blobs(CODEC)

    @property
    def outer(self) -> list[bytes]:
        """With DiLoCo, the state of each rank's own optimizer, by rank."""
        return self._blobs(OUTER)

    def _blobs(self, name: str) -> list[bytes]:
        data = self.files.get(name, b"\x90")
        blobs: list[bytes] = msgpack.unpackb(data, max_bin_len=len(data))
        return blobs

    def pack(self) -> bytes:
        """The files as msgpack, to be sent."""
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

    ``codec`` and ``outer`` hold what differs between ranks: the codec's memory and, with DiLoCo, the own optimizer.
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
    """Loads a snapshot into ``model`` and ``optimizer``, bit for bit; returns its progress.

    Raises:
        CheckpointError: the stored adapter does not have the configured adapter's parameters.
    """
    restore_adapter(snapshot, model)
    optimizer.state = tree_unflatten(list(unpack_tensors(snapshot.files[OPTIMIZER]).items()))
    mx.eval(optimizer.state)
    progress = snapshot.progress
    log.info("restored the state after step %d", progress.step)
    return progress


def restore_adapter(snapshot: Snapshot, model: nn.Module) -> None:
    """Loads only the trainable parameters. Raises CheckpointError as :func:`restore` does."""
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
    """SHA-256 of the trainable parameters' names and bits: equal on two ranks only if their adapters are identical."""
    return hashlib.sha256(pack_tensors(model.trainable_parameters())).digest()
