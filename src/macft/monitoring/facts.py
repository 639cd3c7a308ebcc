"""The facts of a run, as the terminal and the page show them."""

from __future__ import annotations

from dataclasses import dataclass, field

from macft.monitoring.curve import Point


@dataclass
class NodeFacts:
    """What is known of a node; None is unknown. Speed and times of its newest steps, memory in bytes.

    ``blocks`` are those that it holds, as ``0-11``; empty: all. ``to_next``: bytes a second to the next node, measured
    when the ring formed. ``state`` is the thermal state, ``reason`` why the node may do less than all.
    """

    rank: int
    name: str
    device: str = ""
    blocks: str = ""
    share: float | None = None
    tokens_per_second: float | None = None
    temperature: float | None = None
    state: str = ""
    watts: float | None = None
    is_estimated: bool = False
    joules: float | None = None
    duty: float | None = None
    paused: bool = False
    reason: str = ""
    peak_memory: float | None = None
    memory: float | None = None
    compute_seconds: float | None = None
    wait_seconds: float | None = None
    wire_seconds: float | None = None
    disk_seconds: float | None = None
    to_next: float | None = None


@dataclass(frozen=True)
class ScoreFacts:
    """A metric before and after training, as people read it; empty: not known."""

    name: str
    rows: int
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class EventFacts:
    """A line about what happened; ``time`` in seconds since 1970, ``level`` is info, good, warning or error."""

    time: float | None
    text: str
    level: str = "info"


@dataclass
class RunFacts:
    """A run at a moment.

    ``status`` is waiting (nothing has been written yet), training, or how the run ended: finished, early_stopped,
    interrupted, failed. ``silent_seconds``: how long no step has come, if that is longer than usual. ``parts``: seconds
    of a step on the node that reports, by name.
    """

    status: str = "waiting"
    detail: str = ""
    model: str = ""
    adapter: str = ""
    rows: str = ""
    layout: str = ""
    step: int = 0
    total_steps: int = 0
    loss: float | None = None
    valid_loss: float | None = None
    best_valid_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    step_seconds: float | None = None
    seconds_left: float | None = None
    elapsed_seconds: float | None = None
    silent_seconds: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    scores: list[ScoreFacts] = field(default_factory=list)
    nodes: list[NodeFacts] = field(default_factory=list)
    ring_latency: float | None = None
    watts: float | None = None
    joules: float | None = None
    energy: str = ""
    train_curve: list[Point] = field(default_factory=list)
    valid_curve: list[Point] = field(default_factory=list)
    events: list[EventFacts] = field(default_factory=list)

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come, unless the run is resumed."""
        return self.status not in ("waiting", "training")
