"""What happens in a run, as data; times in seconds, memory in bytes.

A new event is a frozen dataclass that derives from :class:`Event` or :class:`ReplayedEvent`. The metrics file, the
fan-out and the failover carry it as it is; a sink that shows it gets a ``case`` in its ``handle``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

from macft.parallel.node_status import NodeStatus
from macft.report.energy import Energy

NOT_RECORDED = {"recorded_as": None}
"""Metadata of a field that the metrics file leaves out; with a name in place of None, the field has that name there."""


@dataclass(frozen=True)
class Event:
    """Something that happens in a run.

    ``type_name`` is the class's name in snake case, as in metrics.jsonl. The metrics file leaves out an event whose
    ``is_recorded`` is false.
    """

    type_name: ClassVar[str] = "event"
    is_recorded: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        cls.type_name = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()


@dataclass(frozen=True)
class ReplayedEvent(Event):
    """An event after ``step`` updates, the same on every rank.

    A rank that becomes the leader reports those that the previous leader did not.
    """

    step: int


@dataclass(frozen=True)
class RunStarted(Event):
    """Everything is loaded; the score before training or the first step comes next.

    ``first_step`` counts the updates already made, 0 unless the run resumes. ``shares`` says how the rows of
    a batch are divided among the ``world_size`` nodes, ``layout`` where this node has the model's weights.
    """

    run_folder: Path
    device: str
    model: str
    adapter: str
    trainable_parameters: int
    total_parameters: int
    train_rows: int
    valid_rows: int
    test_rows: int
    batch_size: int
    total_steps: int
    first_step: int
    rank: int
    world_size: int
    shares: str
    config_yaml: str = field(metadata=NOT_RECORDED)
    notes: list[str]
    layout: str = ""


@dataclass(frozen=True)
class NodeDescription:
    """A node: its name, its device for people, and the bytes that MLX may use there.

    ``blocks``: the first and the last of the model's blocks that it holds; None: all of them. ``to_next``: bytes a
    second to the next node of the ring, as measured when the ring formed.
    """

    name: str
    device: str
    memory: float
    blocks: list[int] | None = None
    to_next: float | None = None


@dataclass(frozen=True)
class RingFormed(Event):
    """The nodes, by rank, of ``generation``, which counts the changes of the nodes. One that is alone is in it too.

    ``latency``: seconds of a small message from one node to the next.
    """

    generation: int
    nodes: list[NodeDescription]
    latency: float | None = None


@dataclass(frozen=True)
class StepDone(ReplayedEvent):
    """An update was made. ``step`` counts from 1; ``loss`` is the global mean per target token, in nats.

    ``target_tokens`` and ``tokens`` (prompt included, padding not) count all nodes; ``node_tokens`` this one.
    ``parts`` splits ``seconds`` into data, compute, all_reduce, update and, with DiLoCo, sync;
    ``all_reduce_hidden`` is the part of the all-reduce within compute, ``disk`` that in which it waited for weights. On
    a single node with a compiled step, compute includes the update, and data is the time that the device waited
    between two steps.
    ``nodes`` and ``shares`` (of this step's rows, 1 in all) are by rank. ``bytes_sent``: by this node, for this step.
    ``residual_norm``: L2 norm of what this node's codec has rounded off and not yet added. ``generation`` counts the
    changes of the nodes. ``traces``: how often this node has traced a gradient to compile it so far, once for each
    shape.
    """

    total_steps: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    target_tokens: int
    tokens: int
    node_tokens: int
    seconds: float
    parts: Mapping[str, float]
    bytes_sent: int
    residual_norm: float
    peak_memory: int
    active_memory: int
    nodes: list[NodeStatus] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    generation: int = 0
    traces: int = 0
    # How many of the model's blocks each rank computes; empty where all compute all.
    blocks: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class BlocksMoved(ReplayedEvent):
    """Stages of a pipeline have handed over blocks after ``step`` updates, because one of them is slow or hot.

    By rank: ``before`` and ``blocks`` are how many each had and has, ``reasons`` why it may compute only a part of the
    time (empty where it may always), ``spans`` which blocks it has now, as ``0-11``. ``gain``: the part of a step's
    time that this is expected to save. ``layout``: the spans for people.
    """

    before: list[int]
    blocks: list[int]
    reasons: list[str]
    gain: float
    layout: str
    spans: list[str] = field(default_factory=list)

    @property
    def line(self) -> str:
        """For people, in one line."""
        givers = [
            f"rank {rank} hands over {old - new} block{'s' if old - new > 1 else ''} ({reason or 'slower than others'})"
            for rank, (old, new, reason) in enumerate(zip(self.before, self.blocks, self.reasons, strict=True))
            if new < old
        ]
        return f"{', '.join(givers)}; now {self.layout}; a step is expected to take {self.gain:.0%} less time"


@dataclass(frozen=True)
class NodesChanged(ReplayedEvent):
    """Nodes were lost (``left``: names and reasons) or joined; ``names`` and ``shares`` are by new rank.

    ``step`` updates have been made. The next one is computed with the new nodes, ``seconds`` after the change was
    detected. ``recomputed``: this node had begun it with the old ones. ``generation`` counts the changes.
    """

    generation: int
    names: list[str]
    left: Mapping[str, str]
    joined: list[str]
    shares: list[float]
    recomputed: bool
    seconds: float = 0.0
    # Which blocks each rank has now; empty where all have all.
    layout: str = ""

    @property
    def line(self) -> str:
        """For people, in one line."""
        changes = [f"{name} is lost ({reason})" for name, reason in self.left.items()]
        changes += [f"{name} joins" for name in self.joined]
        change = "; ".join(changes) or "the ring broke and was rebuilt with the same nodes"
        count = f"{len(self.names)} node{'s' if len(self.names) > 1 else ''}"
        when = "left" if self.left and not self.joined else "now"
        shares = ", ".join(f"{name} {share:.0%}" for name, share in zip(self.names, self.shares, strict=True))
        shares = self.layout or shares
        redone = f"step {self.step + 1} is computed again" if self.recomputed else "no step was lost"
        return f"{change}; {count} {when}: {shares}; {redone}, {self.seconds:.1f} s"


@dataclass(frozen=True)
class Evaluated(ReplayedEvent):
    """The validation loss after ``step`` updates: the mean per target token, in nats."""

    loss: float
    target_tokens: int
    seconds: float
    is_best: bool


@dataclass(frozen=True)
class MetricScored(ReplayedEvent):
    """A metric of the dataset over ``count`` rows of ``split``; ``when`` is before or after training.

    Shares are 0 to 1; a perplexity is 1 or more; a metric of the user's own, whose ``name`` has a dot, any number.
    """

    name: str
    split: str
    when: str
    value: float
    count: int
    seconds: float


@dataclass(frozen=True)
class Sample:
    """One question with the answers of the untrained and of the trained model.

    ``prompt`` and ``expected`` are texts. An answer is None where there is none; whether it is right is None where no
    metric says so.
    """

    prompt: str
    expected: str
    before: str | None
    after: str | None
    before_correct: bool | None
    after_correct: bool | None


@dataclass(frozen=True)
class SamplesShown(Event):
    """Answers side by side."""

    step: int
    samples: list[Sample]


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """A checkpoint is on disk; it took ``seconds``, for ``waited`` of which training was blocked."""

    step: int
    path: Path
    is_best: bool
    seconds: float
    waited: float


@dataclass(frozen=True)
class Noted(Event):
    """Something worth a line; ``level`` is info, warning or error."""

    text: str
    level: str = "info"


@dataclass(frozen=True)
class PhaseProgress(Event):
    """Progress of an evaluation, of the answers to questions, or of saving the adapter."""

    is_recorded: ClassVar[bool] = False

    name: str
    done: int
    total: int


@dataclass(frozen=True)
class RunEnded(Event):
    """The run has ended; ``reason`` is finished, early_stopped, interrupted or failed.

    ``final`` holds results by name; that of ``NAME`` before training is ``NAME_before``. Names that end in
    ``loss`` are losses in nats, the others as in :class:`MetricScored`. ``detail``: the error, or how to continue.
    ``warnings``: problems that did not stop the run, a line each.
    """

    reason: str
    steps: int
    seconds: float
    final: Mapping[str, float] = field(default_factory=dict)
    adapter_folder: Path | None = None
    adapter_sha256: str = ""
    detail: str = ""
    energy: Energy | None = None
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RunEnding(Event):
    """The results are there and have to be kept: the summary is written. ``end`` follows once all ranks know."""

    is_recorded: ClassVar[bool] = False

    end: RunEnded


class Sink(Protocol):
    """Shows or stores a run's events, which come in order and from one thread. It ignores those it does not know.

    A call that fails raises; see :class:`~macft.report.sinks.fan_out.FanOut`.
    """

    def handle(self, event: Event) -> None:
        """Takes one event."""
        ...

    def close(self) -> None:
        """Releases what the sink holds. Safe to call twice."""
        ...


class Reporter(Sink, Protocol):
    """What a run sends its events to, on every rank."""

    def lead(self, *, is_main: bool, step: int) -> None:
        """Tells whether this rank reports the run from now on, after ``step`` updates."""
        ...

    def recent(self, step: int) -> list[ReplayedEvent]:
        """This rank's last events, from that of update ``step`` on."""
        ...

    def catch_up(self, events: Sequence[ReplayedEvent]) -> None:
        """Takes those of another rank's events that this rank has not had."""
        ...


class NullReporter:
    """Ignores every event."""

    def handle(self, event: Event) -> None:
        """Ignores the event."""

    def lead(self, *, is_main: bool, step: int) -> None:
        """Ignores the change."""

    def recent(self, step: int) -> list[ReplayedEvent]:  # noqa: ARG002
        """Remembers none."""
        return []

    def catch_up(self, events: Sequence[ReplayedEvent]) -> None:
        """Ignores the events."""

    def close(self) -> None:
        """Has nothing to release."""
