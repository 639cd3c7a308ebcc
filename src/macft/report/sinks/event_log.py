"""Writes a run's events to the log of this rank, and keeps the step and generation of its lines up to date."""

from __future__ import annotations

import logging

from macft.logs.run_log import log_context
from macft.report.events import (
    BlocksMoved,
    Evaluated,
    Event,
    MetricScored,
    NodesChanged,
    Noted,
    RunEnded,
    RunStarted,
    StepDone,
)

log = logging.getLogger("macft.run")


class EventLog:
    """Logs what happens in the run; each step at level ``debug``."""

    def handle(self, event: Event) -> None:
        """Writes at most one line."""
        match event:
            case RunStarted():
                log_context.update(step=event.first_step)
                log.info("started: %s, %s", event.model, event.adapter)
                log.info("%d nodes, steps %d to %d", event.world_size, event.first_step + 1, event.total_steps)
                for note in event.notes:
                    log.info("%s", note)
            case StepDone():
                log_context.update(step=event.step, generation=event.generation)
                log.debug("loss %.4f, gradient norm %.3g, %.3f s", event.loss, event.grad_norm, event.seconds)
            case Evaluated():
                log.info("validation loss %.4f%s, %.1f s", event.loss, ", the best" * event.is_best, event.seconds)
            case MetricScored():
                log.info("%s %.4f %s training, %.1f s", event.name, event.value, event.when, event.seconds)
            case NodesChanged():
                log_context.update(step=event.step, generation=event.generation)
                log.warning("%s", event.line)
            case BlocksMoved():
                log.info("%s", event.line)
            case Noted():
                log.log(logging.getLevelNamesMapping().get(event.level.upper(), logging.INFO), "%s", event.text)
            case RunEnded():
                log.info("%s after %d steps, %.1f s", event.reason, event.steps, event.seconds)
                if event.detail:
                    log.info("%s", event.detail)

    def close(self) -> None:
        """Has nothing to release."""
