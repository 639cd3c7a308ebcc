"""What happens in a run, as the trainer tells it; times in seconds, memory in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from macft.parallel.node_status import NodeStatus
from macft.report.energy import Energy


@dataclass(frozen=True)
class RunStarted:
    """Everything is loaded; the next thing is the first step, or the score before it.

    ``first_step`` counts the updates already made, 0 unless the run resumes. ``shares`` says how the rows of
    a batch are divided among the ``world_size`` nodes.
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
    config_yaml: str
    notes: list[str]


@dataclass(frozen=True)
class StepDone:
    """An update was made. ``step`` counts from 1; ``loss`` is the global mean per target token, in nats.

    ``target_tokens`` and ``tokens`` (prompt included, padding not) count all nodes; ``node_tokens`` this one.
    ``parts`` splits ``seconds`` into data, compute, all_reduce, update and, with DiLoCo, sync;
    ``all_reduce_hidden`` is a part of compute. A lone node that compiles makes the update within compute, and its data
    is what the device waited for between two steps.
    ``nodes`` and ``shares`` of this step's rows, 1 in all, are by rank.
    """

    step: int
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
    # Bytes this node sent for the step, and the L2 norm of what its codec has rounded away and not yet added.
    bytes_sent: int
    residual_norm: float
    peak_memory: int
    active_memory: int
    nodes: list[NodeStatus] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    # Counts the changes of the nodes that take part.
    generation: int = 0


@dataclass(frozen=True)
class NodesChanged:
    """Nodes were lost (``left``: names and reasons) or joined; ``names`` and ``shares`` by rank are those from now on.

    ``step`` updates have been made; the next one is computed with the new nodes, ``seconds`` after the change was
    found. ``recomputed``: this node had begun it before.
    """

    step: int
    generation: int
    names: list[str]
    left: Mapping[str, str]
    joined: list[str]
    shares: list[float]
    recomputed: bool
    seconds: float = 0.0


@dataclass(frozen=True)
class Evaluated:
    """The validation loss after ``step`` updates: the mean per target token, in nats."""

    step: int
    loss: float
    target_tokens: int
    seconds: float
    is_best: bool


@dataclass(frozen=True)
class MetricScored:
    """The dataset's metric, 0 to 1, over ``count`` rows; ``when`` is before or after training."""

    step: int
    name: str
    split: str
    when: str
    value: float
    count: int
    seconds: float


@dataclass(frozen=True)
class Sample:
    """One question with the answers of the untrained and of the trained model."""

    prompt: str
    expected: str
    before: str | None
    after: str | None
    before_correct: bool | None
    after_correct: bool | None


@dataclass(frozen=True)
class SamplesShown:
    """Answers side by side."""

    step: int
    samples: list[Sample]


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint is safely on disk; it took ``seconds``, of which training stood still for ``waited``."""

    step: int
    path: Path
    is_best: bool
    seconds: float
    waited: float


@dataclass(frozen=True)
class Noted:
    """Something worth a line; ``level`` is info, warning or error."""

    text: str
    level: str = "info"


@dataclass(frozen=True)
class PhaseProgress:
    """How far an evaluation or the answering of questions is."""

    name: str
    done: int
    total: int


@dataclass(frozen=True)
class RunEnded:
    """The end: ``reason`` is finished, early_stopped, interrupted or failed.

    ``final`` holds results by name; that of ``NAME`` before training is ``NAME_before``. Names that end in
    ``loss`` are losses in nats, all others fractions from 0 to 1. ``detail``: what went wrong, how to go on.
    ``warnings``: what the user has to know although the run went on, a line each.
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


def change_line(event: NodesChanged) -> str:
    """A change of the nodes in a line for people."""
    parts = [f"{name} is lost ({why})" for name, why in event.left.items()]
    parts += [f"{name} joins" for name in event.joined]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in zip(event.names, event.shares, strict=True))
    count = f"{len(event.names)} node{'s' if len(event.names) > 1 else ''}"
    what = "; ".join(parts) or "the ring broke, all nodes are there"
    again = f"step {event.step + 1} is computed again" if event.recomputed else "no step was lost"
    return f"{what}; {count} in generation {event.generation}: {shares}; {again}, {event.seconds:.1f} s"


Event = (
    RunStarted
    | StepDone
    | NodesChanged
    | Evaluated
    | MetricScored
    | SamplesShown
    | CheckpointSaved
    | Noted
    | PhaseProgress
    | RunEnded
)


def _dispatch(reporter: Any, event: Event) -> None:
    name = "".join("_" + c.lower() if c.isupper() else c for c in type(event).__name__).lstrip("_")
    getattr(reporter, name)(event)


class Reporter(Protocol):
    """Receives a run's events, in order, all from one thread.

    A method that can't do its part raises; see :class:`~macft.report.fan_out.FanOut`.
    """

    def handle(self, event: Event) -> None:
        """Reports ``event``."""
        _dispatch(self, event)

    def run_started(self, event: RunStarted) -> None: ...
    def step_done(self, event: StepDone) -> None: ...
    def evaluated(self, event: Evaluated) -> None: ...
    def metric_scored(self, event: MetricScored) -> None: ...
    def samples_shown(self, event: SamplesShown) -> None: ...
    def checkpoint_saved(self, event: CheckpointSaved) -> None: ...
    def noted(self, event: Noted) -> None: ...
    def phase_progress(self, event: PhaseProgress) -> None: ...
    def nodes_changed(self, event: NodesChanged) -> None: ...
    def lead(self, *, is_main: bool, step: int) -> None: ...
    def run_ended(self, event: RunEnded) -> None: ...
    def close(self) -> None: ...


class SilentReporter:
    """Ignores every event; reporters that care for some events only build on it."""

    def handle(self, event: Event) -> None:
        """Reports ``event``."""
        _dispatch(self, event)

    def run_started(self, event: RunStarted) -> None:
        """Ignored."""

    def step_done(self, event: StepDone) -> None:
        """Ignored."""

    def evaluated(self, event: Evaluated) -> None:
        """Ignored."""

    def metric_scored(self, event: MetricScored) -> None:
        """Ignored."""

    def samples_shown(self, event: SamplesShown) -> None:
        """Ignored."""

    def checkpoint_saved(self, event: CheckpointSaved) -> None:
        """Ignored."""

    def noted(self, event: Noted) -> None:
        """Ignored."""

    def phase_progress(self, event: PhaseProgress) -> None:
        """Ignored."""

    def nodes_changed(self, event: NodesChanged) -> None:
        """Ignored."""

    def lead(self, *, is_main: bool, step: int) -> None:
        """Whether this node speaks for the run from now on, after ``step`` updates. Ignored."""

    def run_ended(self, event: RunEnded) -> None:
        """Ignored."""

    def close(self) -> None:
        """Nothing to release."""
