"""``python -m macft.monitor RUN_FOLDER``: shows a run live, from the files in its folder."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from macft.cli.parser import Parser, command_parser
from macft.cli.run_command import run_command
from macft.errors import ConfigError
from macft.report.latest import followed
from macft.report.run_folder import RunFolder
from macft.thermal.readings import STATES

# A run's whole file may be large; only its beginning and its last lines are needed.
_HEAD_BYTES, _TAIL_BYTES = 1 << 18, 1 << 18
_STEPS_AVERAGED = 20
_REFRESH_SECONDS = 1.0
_STAGE_TIMES = ("wait_seconds", "wire_seconds", "disk_seconds")
_LINES = 4
# After this many step times without a step, the time since the last one is shown.
_LATE_AFTER_STEPS = 5.0


@dataclass
class RunView:
    """What is shown of the metrics file: the start, the newest steps, validation loss and notes, the end."""

    started: Mapping[str, object] = field(default_factory=dict)
    steps: list[Mapping[str, object]] = field(default_factory=list)
    valid_loss: float | None = None
    notes: list[str] = field(default_factory=list)
    ended: Mapping[str, object] = field(default_factory=dict)


def main(argv: Sequence[str]) -> None:
    """Shows the run until it ends or Ctrl-C is pressed.

    Raises:
        ConfigError: The arguments are wrong, or the folder has no metrics file.
    """
    options = _parser().parse_args(argv)
    path = RunFolder(followed(options.run_folder)).metrics
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; give the folder of a run with report.metrics_file=true")
    console = Console(highlight=False)
    if options.once:
        console.print(render(read(path), now=time.time()))
        return
    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                view = read(path)
                live.update(render(view, now=time.time()), refresh=True)
                if view.ended:
                    return
                time.sleep(_REFRESH_SECONDS)
    except KeyboardInterrupt:
        return  # the usual way to leave it


def _parser() -> Parser:
    parser = command_parser("monitor")
    parser.add_argument("run_folder", type=Path, help="the run's folder, runs/NAME/TIME or runs/latest")
    parser.add_argument("--once", action="store_true", help="print the state once and exit")
    return parser


def read(path: Path) -> RunView:
    """Reads the start and the end of a metrics file; torn lines and unknown events are skipped."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        size = file.seek(0, 2)
        file.seek(max(len(head), size - _TAIL_BYTES))
        tail = file.read()
    view = RunView()
    for line in (head + tail).split(b"\n"):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict):
            _add(view, event)
    return view


def _add(view: RunView, event: Mapping[str, object]) -> None:
    kind = event.get("type")
    if kind == "run_started":
        view.started, view.ended = event, {}
    elif kind == "step_done":
        view.steps = [*view.steps[1 - _STEPS_AVERAGED :], event]
    elif kind == "evaluated":
        view.valid_loss = _number(event.get("loss"))
    elif kind == "noted":
        view.notes = [*view.notes[1 - _LINES :], str(event.get("text", ""))[:300]]
    elif kind == "run_ended":
        view.ended = event


def render(view: RunView, *, now: float) -> Group:
    """The view as rich prints it; ``now`` is in seconds since 1970."""
    if not view.steps:
        return Group(Text(f"{view.started.get('model', 'The run')}: no step yet"))
    parts: list[RenderableType] = [Text(_headline(view, now), style="bold"), _nodes(view)]
    parts += [Text(f"· {note}", style="dim") for note in view.notes]
    return Group(*parts)


def _headline(view: RunView, now: float) -> str:
    last = view.steps[-1]
    step, total = int(_number(last.get("step")) or 0), int(_number(last.get("total_steps")) or 0)
    seconds = [_number(item.get("seconds")) or 0.0 for item in view.steps]
    tokens = sum(_number(item.get("tokens")) or 0.0 for item in view.steps)
    mean = sum(seconds) / len(seconds)
    parts = [f"step {step}/{total}"]
    if (loss := _number(last.get("loss"))) is not None:
        parts.append(f"loss {loss:.3f}")
    if view.valid_loss is not None:
        parts.append(f"validation {view.valid_loss:.3f}")
    parts.append(f"{tokens / max(sum(seconds), 1e-9):,.0f} tokens/s")
    if view.ended:
        parts.append(str(view.ended.get("reason", "ended")))
        return "  ".join(parts)
    parts.append(f"left {timedelta(seconds=round(mean * (total - step)))}")
    since_last = now - (_number(last.get("time")) or now)
    if since_last > _LATE_AFTER_STEPS * max(mean, 1.0):
        parts.append(f"no step for {timedelta(seconds=round(since_last))}")
    return "  ".join(parts)


def _nodes(view: RunView) -> Table:
    last = view.steps[-1]
    table = Table(box=None, pad_edge=False)
    nodes, shares, blocks = (_items(last.get(name)) for name in ("nodes", "shares", "blocks"))
    # In a pipeline: a stage's blocks, what it waited for the others and for its disk, and how long it was sending.
    stage_times = [name for name in _STAGE_TIMES if any(_number(_value(node, name)) is not None for node in nodes)]
    for name in (
        *("node", "share", "tokens/s", "temp", "state", "power", "duty", "energy", "link"),
        *(["blocks"] if blocks else []),
        *(name.removesuffix("_seconds") for name in stage_times),
    ):
        table.add_column(name, no_wrap=True, justify="left" if name in ("node", "state") else "right")
    parts = last.get("parts")
    all_reduce = _number(parts.get("all_reduce")) if isinstance(parts, Mapping) else None
    for rank, node in enumerate(node for node in nodes if isinstance(node, Mapping)):
        table.add_row(
            str(rank),
            _shown(shares[rank] if rank < len(shares) else None, "{:.0%}"),
            _shown(_speed(view, rank), "{:,.0f}"),
            _shown(node.get("temperature"), "{:.1f} C"),
            _state(node.get("state")),
            _shown(node.get("watts"), "{:.1f} W") + ("~" if node.get("estimated") else ""),
            "paused" if node.get("paused") else _shown(node.get("duty"), "{:.0%}"),
            _shown(node.get("joules"), "{:,.0f} J"),
            # The all-reduce of the whole step, on rank 0's clock.
            _shown(all_reduce, "{:.2f} s") if rank == 0 and len(nodes) > 1 else "",
            *([_shown(blocks[rank] if rank < len(blocks) else None, "{:.0f}")] if blocks else []),
            *(_shown(node.get(name), "{:.2f} s") for name in stage_times),
        )
    return table


def _value(node: object, name: str) -> object:
    return node.get(name) if isinstance(node, Mapping) else None


def _speed(view: RunView, rank: int) -> float | None:
    """A node's tokens/s while it computes, over the newest steps."""
    tokens = seconds = 0.0
    for step in view.steps:
        nodes = _items(step.get("nodes"))
        if rank < len(nodes) and isinstance(node := nodes[rank], Mapping):
            tokens += _number(node.get("tokens")) or 0.0
            seconds += _number(node.get("busy_seconds")) or 0.0
    return tokens / seconds if seconds > 0 else None


def _state(value: object) -> str:
    number = _number(value)
    return STATES[int(number)] if number is not None and 0 <= number < len(STATES) else "-"


def _shown(value: object, form: str) -> str:
    number = _number(value)
    return "-" if number is None else form.format(number)


def _items(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


if __name__ == "__main__":
    sys.exit(run_command(main))
