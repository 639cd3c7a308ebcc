"""What goes through the stages of a pipeline that answers, and what comes back, as messages.

A task is some tokens of one answer (a chunk of its prompt, or the newest token), or rows whose loss is asked for. From
stage to stage it carries hidden states; back to the first stage goes only the token that was chosen.
"""

from __future__ import annotations

import struct
from dataclasses import asdict, dataclass, field, fields
from enum import IntEnum
from typing import Any

import mlx.core as mx
import msgpack

from macft.collective.array_bytes import array_bytes, array_of
from macft.errors import ProtocolError
from macft.evaluation.chat import Sampling

_LENGTH = struct.Struct("<I")
_MAX_HEADER_BYTES = 64 * 2**20
_DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}


class TaskKind(IntEnum):
    """What a task is for."""

    TOKENS = 0
    LOSS = 1
    # Nothing to compute: shows that all ranks are alive.
    NOTHING = 2
    # The last one.
    END = 3


@dataclass(frozen=True)
class Options:
    """How the tokens of one answer are chosen.

    Attributes:
        sampling: mlx-lm's options.
        key: MLX's random key, as one number of 64 bits: a seed at first, and later what the draws have made of it.
        penalties: Arguments of mlx-lm's ``make_logits_processors``, for instance ``repetition_penalty``.
        logit_bias: Pairs of a token and what is added to its logit.
        top: Number of most likely tokens to report.
    """

    sampling: Sampling = field(default_factory=Sampling)
    key: int = 0
    penalties: dict[str, float] = field(default_factory=dict)
    logit_bias: tuple[tuple[int, float], ...] = ()
    top: int = 0


@dataclass(frozen=True)
class LossRows:
    """Rows whose loss is asked for: ``inputs`` (rows, length); the others (n,), as the loss takes them."""

    inputs: list[list[int]]
    positions: list[int]
    targets: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Task:
    """A step of one answer through all stages.

    Attributes:
        kind: What it is for.
        answer: Number of the answer.
        tokens: To be computed, after those of earlier tasks of the same answer.
        options: Comes with the first task of an answer.
        chooses: Whether the token that follows is asked for.
        forget: Tokens at the end of what was computed for this answer that are taken back first.
        ended: Answers that are over.
        rows: For a loss.
    """

    kind: TaskKind
    answer: int = 0
    tokens: tuple[int, ...] = ()
    options: Options | None = None
    chooses: bool = False
    forget: int = 0
    ended: tuple[int, ...] = ()
    rows: LossRows | None = None


@dataclass(frozen=True)
class Outcome:
    """What the last stage made of a task.

    Attributes:
        token: That follows; None if none was asked for.
        logprob: Its log-probability.
        top: The most likely tokens and their log-probabilities.
        key: What the draw has left of the answer's random key.
        loss: Summed over the rows, in nats.
    """

    token: int | None = None
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()
    key: int = 0
    loss: float = 0.0


def pack_task(task: Task, hidden: mx.array | None) -> memoryview:
    """The message to the next stage; ``hidden`` (rows, length, d) is what this one made of the task."""
    values: dict[str, Any] = {**asdict(task), "shape": [], "dtype": ""}
    data = memoryview(b"")
    if hidden is not None:
        values["shape"], values["dtype"] = list(hidden.shape), str(hidden.dtype).removeprefix("mlx.core.")
        data = array_bytes(hidden)
    header = msgpack.packb(values)
    return memoryview(b"".join((_LENGTH.pack(len(header)), header, data)))


def unpack_task(message: memoryview) -> tuple[Task, mx.array | None]:
    """The inverse of :func:`pack_task`.

    Raises:
        ProtocolError: it is no such message.
    """
    try:
        (length,) = _LENGTH.unpack_from(message)
        if length > _MAX_HEADER_BYTES:
            raise ValueError(length)
        values = msgpack.unpackb(message[_LENGTH.size : _LENGTH.size + length])
        shape, dtype = [int(size) for size in values.pop("shape")], values.pop("dtype")
        options, rows = values.pop("options"), values.pop("rows")
        task = Task(
            kind=TaskKind(values.pop("kind")),
            answer=int(values["answer"]),
            tokens=tuple(int(token) for token in values["tokens"]),
            options=None if options is None else _options(options),
            chooses=bool(values["chooses"]),
            forget=int(values["forget"]),
            ended=tuple(int(answer) for answer in values["ended"]),
            rows=None if rows is None else LossRows(**rows),
        )
        hidden = array_of(message[_LENGTH.size + length :], shape, _DTYPES[dtype]) if shape else None
    except (ValueError, TypeError, KeyError, AttributeError, struct.error, msgpack.UnpackException) as error:
        raise ProtocolError(f"a message between stages is malformed ({type(error).__name__})") from None
    return task, hidden


def pack_outcome(outcome: Outcome) -> bytes:
    """The message of the last stage to the first one."""
    packed: bytes = msgpack.packb(asdict(outcome))
    return packed


def unpack_outcome(message: memoryview) -> Outcome:
    """The inverse of :func:`pack_outcome`. Raises ProtocolError for anything else."""
    try:
        values = msgpack.unpackb(message)
        token = values["token"]
        return Outcome(
            token=None if token is None else int(token),
            logprob=float(values["logprob"]),
            top=tuple((int(token), float(logprob)) for token, logprob in values["top"]),
            key=int(values["key"]),
            loss=float(values["loss"]),
        )
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise ProtocolError(f"an answer of the last stage is malformed ({type(error).__name__})") from None


def _options(values: dict[str, Any]) -> Options:
    known = {each.name for each in fields(Sampling)}
    sampling = Sampling(**{name: value for name, value in values["sampling"].items() if name in known})
    bias = tuple((int(token), float(value)) for token, value in values["logit_bias"])
    return Options(sampling, int(values["key"]), dict(values["penalties"]), bias, int(values["top"]))
