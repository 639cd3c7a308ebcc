"""A run's facts at a terminal of any width: a table of the nodes where it fits, lines for each node where not."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from macft.monitoring.facts import NodeFacts, RunFacts, ScoreFacts
from macft.monitoring.wording import gigabytes, link_speed, shown, status_line
from macft.report.durations import duration

_BARS = "▁▂▃▄▅▆▇█"
_EVENTS = 5
_NARROWEST = 20
_WIDEST_CURVE, _WIDEST_BAR = 72, 40
_LEVELS = {"good": "green", "warning": "yellow", "error": "red"}
_STATUSES = {"finished": "green", "early_stopped": "green", "interrupted": "yellow", "failed": "red"}


class TerminalView:
    """Draws ``facts`` as rich does, within the width that it is given."""

    def __init__(self, facts: RunFacts):
        self._facts = facts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        facts, width = self._facts, max(options.max_width, _NARROWEST)
        yield from _heading(facts, width)
        if len(facts.train_curve) > 1:
            yield _curve(facts, width)
        if facts.nodes:
            table = _table(facts)
            if Measurement.get(console, options.update(max_width=10_000), table).maximum <= width:
                yield table
            else:
                for node in facts.nodes:
                    yield from _lines_of(node, facts, width)
        if len(facts.nodes) > 1 and facts.ring_latency is not None:
            yield from _folded(f"ring: {facts.ring_latency * 1e6:,.0f} us from node to node", width)
        for event in facts.events[-_EVENTS:]:
            clock = f"{time.strftime('%H:%M:%S', time.localtime(event.time))} " if event.time is not None else ""
            yield from _folded(f"{clock}{event.text}", width, _LEVELS.get(event.level, "dim"))


def _heading(facts: RunFacts, width: int) -> RenderResult:
    yield from _folded(facts.model or "The run", width, "bold")
    about = [facts.adapter, facts.rows, facts.layout]
    yield from _wrapped([part for part in about if part], width, "dim")
    if facts.total_steps:
        share = min(facts.step / facts.total_steps, 1.0)
        label = f" {facts.step:,}/{facts.total_steps:,} {share:.0%}"
        bar = max(_NARROWEST // 2, min(_WIDEST_BAR, width - len(label) - 1))
        full = round(bar * share)
        yield Text.assemble(("━" * full, "green"), ("━" * (bar - full), "dim"), label, overflow="crop", no_wrap=True)
    status = status_line(facts.status)
    if facts.silent_seconds is not None:
        status += f", no step for {duration(facts.silent_seconds)}"
    if facts.seconds_left is not None:
        status += f", {duration(facts.seconds_left)} left"
    if facts.elapsed_seconds is not None:
        status += f", {duration(facts.elapsed_seconds)} so far" if not facts.has_ended else ""
    late = "yellow" if facts.silent_seconds is not None else ""
    yield from _folded(status, width, _STATUSES.get(facts.status, late))
    parts = [
        shown(facts.loss, "loss {:.3f}", ""),
        shown(facts.valid_loss, "validation {:.3f}", ""),
        *[_score(score) for score in facts.scores],
        shown(facts.tokens_per_second, "{:,.0f} tokens/s", ""),
        shown(facts.step_seconds, "{:.2f} s a step", ""),
        shown(facts.learning_rate, "lr {:.2e}", ""),
        shown(facts.watts, "{:.1f} W", "") + ("~" if any(node.is_estimated for node in facts.nodes) else ""),
        facts.energy or shown(facts.joules, "{:,.0f} J", ""),
    ]
    yield from _wrapped([part for part in parts if part], width, "bold")
    if facts.parts and facts.step_seconds:
        whole = max(facts.step_seconds, 1e-9)
        shares = [f"{name.replace('_', '-')} {value / whole:.0%}" for name, value in facts.parts.items()]
        yield from _wrapped([f"a step: {shares[0]}", *shares[1:]], width, "dim")


def _score(score: ScoreFacts) -> str:
    if score.before and score.after:
        return f"{score.name} {score.before} → {score.after}"
    return f"{score.name} {score.after or score.before or '-'}"


def _curve(facts: RunFacts, width: int) -> Text:
    """The training loss, from its highest value to its lowest."""
    values = [point.value for point in facts.train_curve]
    low, high = min(values), max(values)
    label = f" {high:.2f} to {low:.2f}"
    places = min(len(values), _WIDEST_CURVE, max(1, width - len(label) - 6))
    step = len(values) / places
    means = [_mean(values[int(i * step) : max(int((i + 1) * step), int(i * step) + 1)]) for i in range(places)]
    scale = (len(_BARS) - 1) / max(high - low, 1e-12)
    bars = "".join(_BARS[round((mean - low) * scale)] for mean in means)
    return Text.assemble("loss ", (bars, "cyan"), label, overflow="crop", no_wrap=True)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _columns(facts: RunFacts) -> list[tuple[str, list[str]]]:
    """What is known of the nodes, by column: its name, and a text for each node."""
    columns: list[tuple[str, list[str]]] = []

    def column(name: str, values: list[str]) -> None:
        if any(value not in ("", "-") for value in values):
            columns.append((name, values))

    nodes = facts.nodes
    column("blocks", [node.blocks for node in nodes])
    column("share", [shown(node.share, "{:.0%}") for node in nodes])
    column("tokens/s", [shown(node.tokens_per_second, "{:,.0f}") for node in nodes])
    column("temp", [shown(node.temperature, "{:.1f} C") for node in nodes])
    column("state", [node.state or "-" for node in nodes])
    column("power", [shown(node.watts, "{:.1f} W") + ("~" if node.is_estimated else "") for node in nodes])
    column("duty", [_duty(node) for node in nodes])
    column("energy", [shown(node.joules, "{:,.0f} J") for node in nodes])
    column("memory", [_memory(node) for node in nodes])
    for name in ("compute", "wait", "wire", "disk"):
        column(name, [shown(getattr(node, f"{name}_seconds"), "{:.2f} s") for node in nodes])
    if len(nodes) > 1:
        column("to next", [link_speed(node.to_next) for node in nodes])
    return columns


def _duty(node: NodeFacts) -> str:
    if node.paused:
        return f"paused: {node.reason}" if node.reason else "paused"
    return shown(node.duty, "{:.0%}") + (f" {node.reason}" if node.reason else "")


def _memory(node: NodeFacts) -> str:
    if node.peak_memory is None:
        return "-" if node.memory is None else f"- of {gigabytes(node.memory)} GB"
    return f"{gigabytes(node.peak_memory)}" + (f" of {gigabytes(node.memory)} GB" if node.memory else " GB")


def _table(facts: RunFacts) -> Table:
    table = Table(box=None, pad_edge=False)
    columns = [("node", [_name(node) for node in facts.nodes]), *_columns(facts)]
    if any(node.device for node in facts.nodes):
        columns.append(("device", [node.device for node in facts.nodes]))
    for name, _ in columns:
        is_text = name in ("node", "state", "duty", "blocks", "device")
        table.add_column(name, no_wrap=True, justify="left" if is_text else "right")
    for row in zip(*(values for _, values in columns), strict=True):
        table.add_row(*map(Text, row))
    return table


def _name(node: NodeFacts) -> str:
    return node.name if node.name == f"node {node.rank}" else f"{node.rank} {node.name}"


def _lines_of(node: NodeFacts, facts: RunFacts, width: int) -> RenderResult:
    yield from _folded(_name(node) + (f": {node.device}" if node.device else ""), width, "bold")
    parts = [f"{name} {values[node.rank]}" for name, values in _columns(facts) if values[node.rank] not in ("", "-")]
    yield from _wrapped(parts, width, indent="  ")


def _wrapped(parts: Sequence[str], width: int, style: str = "", indent: str = "") -> RenderResult:
    """The parts, as many in a line as fit, none broken unless it is longer than a line."""
    line = ""
    for part in parts:
        if line and len(indent) + len(line) + 2 + len(part) > width:
            yield from _folded(indent + line, width, style, indent)
            line = ""
        line = f"{line}  {part}" if line else part
    if line:
        yield from _folded(indent + line, width, style, indent)


def _folded(text: str, width: int, style: str = "", indent: str = "") -> RenderResult:
    for line in textwrap.wrap(text, width, subsequent_indent=f"{indent}  ", break_on_hyphens=False) or [""]:
        yield Text(line, style=style, no_wrap=True, overflow="fold")
