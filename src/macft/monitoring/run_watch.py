"""Keeps the facts of a run up to date, from its metrics.jsonl alone."""

from __future__ import annotations

import json
import time
from collections import deque
from dataclasses import replace
from pathlib import Path

from macft.monitoring.curve import Curve
from macft.monitoring.event_lines import event_of
from macft.monitoring.facts import EventFacts, NodeFacts, RunFacts, ScoreFacts
from macft.monitoring.values import Line, count, items, mapping, number, text
from macft.report.growing_file import GrowingFile
from macft.report.result_text import result_name, result_text
from macft.report.run_folder import RunFolder
from macft.thermal.readings import STATES

_STEPS_AVERAGED = 20
_MOST_POINTS = 600
_MOST_EVENTS = 100
_LATE_AFTER_STEPS = 5.0
"""After this many step times without a step, the time since the last one is shown."""
_STAGE_TIMES = ("wait_seconds", "wire_seconds", "disk_seconds")
_STATUSES = ("finished", "early_stopped", "interrupted", "failed")


class RunWatch:
    """Reads what has been added to a run's metrics file and says how the run stands. For one thread at a time."""

    def __init__(self, folder: Path):
        self._file = GrowingFile(RunFolder(folder).metrics)
        self._incarnation = 0
        self._begin_anew()

    def update(self) -> bool:
        """Reads what is new; returns whether anything was. Raises OSError where the file can't be read."""
        is_new = False
        while lines := self._file.read():
            if self._file.incarnation != self._incarnation:
                self._incarnation = self._file.incarnation
                self._begin_anew()
            for line in lines:
                try:
                    event = json.loads(line)
                except (ValueError, RecursionError):
                    continue  # torn by a kill
                if isinstance(event, dict):
                    self._add(event)
            is_new = True
        return is_new

    def facts(self, now: float | None = None) -> RunFacts:
        """How the run stands at ``now``, in seconds since 1970."""
        facts = replace(
            self._facts,
            train_curve=self._train.points,
            valid_curve=self._valid.points,
            events=list(self._events),
            scores=list(self._scores.values()),
            nodes=[self._node(node) for node in self._nodes],
        )
        self._add_speed(facts)
        self._add_times(facts, time.time() if now is None else now)
        known = [node.watts for node in facts.nodes if node.watts is not None]
        facts.watts = sum(known) if known else None
        joules = [node.joules for node in facts.nodes if node.joules is not None]
        facts.joules = sum(joules) if joules else None
        return facts

    def _begin_anew(self) -> None:
        self._facts = RunFacts()
        self._train, self._valid = Curve(_MOST_POINTS), Curve(_MOST_POINTS)
        self._events: deque[EventFacts] = deque(maxlen=_MOST_EVENTS)
        self._scores: dict[str, ScoreFacts] = {}
        self._nodes: list[NodeFacts] = []
        self._steps: deque[Line] = deque(maxlen=_STEPS_AVERAGED)
        self._began = self._last = self._last_step = None

    _began: float | None
    _last: float | None
    _last_step: float | None

    def _add(self, line: Line) -> None:
        at = number(line.get("time"))
        self._last = at if at is not None else self._last
        if (event := event_of(line)) is not None and event.text:
            self._events.append(event)
        match line.get("type"):
            case "run_started":
                self._add_start(line)
            case "ring_formed":
                self._add_ring(line)
            case "step_done":
                self._add_step(line)
            case "evaluated":
                self._add_validation(line)
            case "metric_scored":
                self._add_score(line)
            case "nodes_changed":
                self._steps.clear()
                self._nodes = [NodeFacts(rank, text(name)) for rank, name in enumerate(items(line.get("names")))]
                self._facts.layout = text(line.get("layout")) or self._facts.layout
                self._last_step = at
            case "run_ended":
                reason = text(line.get("reason"))
                self._facts.status = reason if reason in _STATUSES else "interrupted"
                self._facts.detail = text(line.get("detail"))
                self._facts.energy = _energy(mapping(line.get("energy")))

    def _add_start(self, line: Line) -> None:
        facts = self._facts
        facts.status, facts.detail, facts.energy = "training", "", ""
        facts.model, facts.adapter = text(line.get("model")), text(line.get("adapter"))
        facts.layout = text(line.get("layout"))
        rows = [count(line.get(f"{name}_rows")) for name in ("train", "valid", "test")]
        facts.rows = "{:,} rows to train, {:,} to validate, {:,} to test".format(*rows)
        facts.step, facts.total_steps = count(line.get("first_step")), count(line.get("total_steps"))
        self._began = self._last_step = number(line.get("time"))
        self._steps.clear()
        if not self._nodes:
            device = text(line.get("device")) if line.get("world_size") == 1 else ""
            self._nodes = [NodeFacts(rank, f"node {rank}", device) for rank in range(_nodes_in(line))]

    def _add_ring(self, line: Line) -> None:
        nodes = []
        for rank, node in enumerate(map(mapping, items(line.get("nodes")))):
            blocks = [count(block) for block in items(node.get("blocks"))]
            nodes.append(
                NodeFacts(
                    rank,
                    text(node.get("name")) or f"node {rank}",
                    text(node.get("device")),
                    blocks=f"{blocks[0]}-{blocks[-1]}" if blocks else "",
                    memory=number(node.get("memory")),
                    to_next=number(node.get("to_next")),
                )
            )
        self._nodes, self._facts.ring_latency = nodes, number(line.get("latency"))

    def _add_step(self, line: Line) -> None:
        facts = self._facts
        facts.step, facts.total_steps = count(line.get("step")), count(line.get("total_steps"))
        facts.loss, facts.learning_rate = number(line.get("loss")), number(line.get("learning_rate"))
        facts.grad_norm = number(line.get("grad_norm"))
        if facts.loss is not None:
            self._train.add(facts.step, facts.loss)
        self._steps.append(line)
        self._last_step = number(line.get("time"))
        for rank in range(len(self._nodes), len(items(line.get("nodes")))):
            self._nodes.append(NodeFacts(rank, f"node {rank}"))

    def _add_validation(self, line: Line) -> None:
        facts, loss = self._facts, number(line.get("loss"))
        self._last_step = number(line.get("time"))
        if loss is None:
            return
        facts.valid_loss = loss
        facts.best_valid_loss = loss if facts.best_valid_loss is None else min(facts.best_valid_loss, loss)
        self._valid.add(count(line.get("step")), loss)

    def _add_score(self, line: Line) -> None:
        name, score = text(line.get("name")), number(line.get("value"))
        value = "" if score is None else result_text(name, score)
        known = self._scores.get(name, ScoreFacts(result_name(name), count(line.get("count"))))
        is_after = line.get("when") == "after"
        self._scores[name] = replace(known, after=value) if is_after else replace(known, before=value)

    def _node(self, known: NodeFacts) -> NodeFacts:
        """``known`` with what the newest steps say of the node."""
        if not self._steps:
            return known
        rank, newest = known.rank, self._steps[-1]
        nodes, shares = items(newest.get("nodes")), items(newest.get("shares"))
        status = mapping(nodes[rank]) if rank < len(nodes) else {}
        tokens = seconds = 0.0
        for step in self._steps:
            of_step = items(step.get("nodes"))
            if rank < len(of_step):
                tokens += number(mapping(of_step[rank]).get("tokens")) or 0.0
                seconds += number(mapping(of_step[rank]).get("busy_seconds")) or 0.0
        peak = number(status.get("peak_memory"))
        if peak is None and len(nodes) == 1:
            peak = number(newest.get("peak_memory"))
        wait, wire, disk = (number(status.get(name)) for name in _STAGE_TIMES)
        is_stage = wait is not None or disk is not None
        busy = number(status.get("busy_seconds")) or 0.0
        return replace(
            known,
            share=number(shares[rank]) if rank < len(shares) else None,
            tokens_per_second=tokens / seconds if seconds > 0 else None,
            temperature=number(status.get("temperature")),
            state=_state(status.get("state")),
            watts=number(status.get("watts")),
            is_estimated=status.get("estimated") is True,
            joules=number(status.get("joules")),
            duty=number(status.get("duty")),
            paused=status.get("paused") is True,
            reason=text(status.get("reason")),
            peak_memory=peak,
            compute_seconds=max(busy - (wait or 0.0) - (disk or 0.0), 0.0) if is_stage else None,
            wait_seconds=wait,
            wire_seconds=wire,
            disk_seconds=disk,
        )

    def _add_speed(self, facts: RunFacts) -> None:
        seconds = [number(step.get("seconds")) or 0.0 for step in self._steps]
        if not seconds:
            return
        tokens = sum(number(step.get("tokens")) or 0.0 for step in self._steps)
        facts.tokens_per_second = tokens / max(sum(seconds), 1e-9)
        facts.step_seconds = sum(seconds) / len(seconds)
        is_alone = len(facts.nodes) == 1  # and waits for nobody
        newest = mapping(self._steps[-1].get("parts"))
        names = [name for name in newest if not (is_alone and name.startswith("all_reduce"))]
        means = {
            text(name): sum(number(mapping(step.get("parts")).get(name)) or 0.0 for step in self._steps) / len(seconds)
            for name in names
        }
        facts.parts = {name: value for name, value in means.items() if value > 0}

    def _add_times(self, facts: RunFacts, now: float) -> None:
        if self._began is not None:
            until = self._last if facts.has_ended and self._last is not None else now
            facts.elapsed_seconds = max(0.0, until - self._began)
        if facts.has_ended:
            return
        if facts.step_seconds is not None:
            facts.seconds_left = facts.step_seconds * max(0, facts.total_steps - facts.step)
        if self._last_step is not None:
            silent = now - self._last_step
            if silent > _LATE_AFTER_STEPS * max(facts.step_seconds or 0.0, 1.0):
                facts.silent_seconds = silent


def _nodes_in(line: Line) -> int:
    return min(max(count(line.get("world_size")), 1), 256)


def _state(value: object) -> str:
    level = number(value)
    return STATES[int(level)] if level is not None and 0 <= level < len(STATES) else ""


def _energy(energy: Line) -> str:
    joules = number(energy.get("joules"))
    if joules is None:
        return ""
    parts = [f"{joules:,.0f} J"]
    if (each := number(energy.get("joules_per_token"))) is not None:
        parts.append(f"{each:.3g} J/token")
    if (average := number(energy.get("average_watts"))) is not None:
        parts.append(f"{average:.1f} W on average")
    if energy.get("estimated") is True:
        parts.append("estimated")
    return ", ".join(parts)
