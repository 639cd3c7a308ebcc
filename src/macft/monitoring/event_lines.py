"""A recorded event as a line for people."""

from __future__ import annotations

from macft.monitoring.facts import EventFacts
from macft.monitoring.values import Line, count, items, mapping, number, text
from macft.report.durations import duration
from macft.report.result_text import result_name, result_text

_ENDS = {
    "finished": ("finished", "good"),
    "early_stopped": ("stopped early: the validation loss no longer fell", "good"),
    "interrupted": ("interrupted", "warning"),
    "failed": ("failed", "error"),
}
_LEVELS = ("info", "warning", "error")


def event_of(line: Line) -> EventFacts | None:
    """What to say of an event; None of those that only change numbers."""
    said = _said(line)
    return None if said is None else EventFacts(number(line.get("time")), text(said[0]), said[1])


def _said(line: Line) -> tuple[str, str] | None:
    match line.get("type"):
        case "run_started":
            first = count(line.get("first_step"))
            return f"resumed after step {first}" if first else "training begins", "info"
        case "evaluated":
            best = ", the best so far" if line.get("is_best") is True and count(line.get("step")) else ""
            return f"{_at(line)}validation loss {number(line.get('loss')) or 0.0:.3f}{best}", "info"
        case "metric_scored":
            name, value = text(line.get("name")), number(line.get("value")) or 0.0
            rows, when = count(line.get("count")), text(line.get("when"))
            of = f"of {rows:,} {text(line.get('split'))} rows, {when} training"
            return f"{result_name(name)} {result_text(name, value)} {of}", "good"
        case "checkpoint_saved":
            return f"{_at(line)}checkpoint saved in {number(line.get('seconds')) or 0.0:.1f} s", "info"
        case "nodes_changed":
            return _at(line) + _change(line), "warning" if mapping(line.get("left")) else "good"
        case "noted":
            level = text(line.get("level"))
            return text(line.get("text")), level if level in _LEVELS else "info"
        case "run_ended":
            reason, level = _ENDS.get(text(line.get("reason")), (text(line.get("reason")), "info"))
            detail = f": {text(line.get('detail'))}" if line.get("detail") else ""
            took = duration(number(line.get("seconds")) or 0.0)
            return f"{reason} after {count(line.get('steps')):,} steps, {took}{detail}", level
        case _:
            return None


def _at(line: Line) -> str:
    step = count(line.get("step"))
    return f"step {step:,}: " if step else "before training: "


def _change(line: Line) -> str:
    left, joined = mapping(line.get("left")), items(line.get("joined"))
    changes = [f"{text(name)} is lost ({text(reason)})" for name, reason in left.items()]
    changes += [f"{text(name)} joins" for name in joined]
    nodes = len(items(line.get("names")))
    return f"{'; '.join(changes) or 'the ring was rebuilt'}; {nodes} node{'s' if nodes != 1 else ''} now"
