"""The terminal: a header, live progress, a line every few steps, and the results."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column, Table
from rich.text import Text

from macft.cli.shell import command
from macft.report.durations import duration
from macft.report.events import (
    BlocksMoved,
    Evaluated,
    Event,
    MetricScored,
    NodesChanged,
    Noted,
    PhaseProgress,
    RunEnded,
    RunStarted,
    SamplesShown,
    StepDone,
)
from macft.report.phase_lines import PhaseLines
from macft.report.result_text import result_name, result_text
from macft.report.run_folder import RunFolder
from macft.report.sinks.console_text import (
    Row,
    base_model,
    millions,
    one_line,
    printable,
    result_rows,
    sample_rows,
    short_path,
    with_broken_path,
)

_PLAIN_WIDTH = 100
_NARROWEST_PANEL = 40
_BAR_COLUMNS = 8
"""The least that a bar takes of a line."""
_PHASE_COLUMNS = len("answering, before") + 3
"""The longest name in front of a bar, and a space between each two columns of the line."""
_PANEL_EDGES = 4
"""Columns of a panel that its frame and the space beside it take."""
# Weight of the newest step in the running speed: about the last twenty steps count.
_SMOOTHING = 0.1
_LONGEST_SILENCE = 30.0
"""Seconds of training after which a step is printed even if it is none of every ``every`` steps."""
_NOTE_STYLES = {"warning": "yellow", "error": "red"}
_TITLES = {
    "finished": ("Finished", "green"),
    "early_stopped": ("Stopped early: the validation loss no longer falls", "green"),
    "interrupted": ("Interrupted", "yellow"),
    "failed": ("Failed", "red"),
}


class ConsoleReporter:
    """Prints through rich, on stdout.

    On a terminal: panels, a live bar, and a permanent line of the first step and
    every ``every`` steps. Elsewhere plain lines without control
    codes, so that logs stay readable. ``changes`` of the nodes are those that another node has already reported.
    Raises OSError when the output is no longer read.
    """

    def __init__(self, *, every: int, console: Console | None = None, changes: Sequence[NodesChanged] = ()):
        self._console = console or _Output(highlight=False)
        self._is_live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._every = every
        self._progress: Progress | None = None
        self._training: TaskID | None = None
        self._phase: tuple[str, TaskID] | None = None
        self._phase_in_lines: str | None = None
        self._phase_lines = PhaseLines(lambda line: self._show_note(line, "info"))
        self._speed = _Speed()
        self._model = ""
        self._folder = RunFolder(Path())
        self._total_steps = 0
        self._has_stepped = False
        self._untold_seconds = 0.0
        self._changes = list(changes)

    def handle(self, event: Event) -> None:
        """Prints the event, or moves the bar."""
        match event:
            case RunStarted():
                self._show_start(event)
            case StepDone():
                self._show_step(event)
            case Evaluated():
                self._show_validation(event)
            case MetricScored():
                self._show_metric(event)
            case SamplesShown():
                self._show_samples(event)
            case NodesChanged():
                self._show_change(event)
            case BlocksMoved():
                self._end_phase()
                self._text(f"{self._position(event.step)}  {printable(event.line)}", "yellow")
            case Noted():
                self._show_note(event.text, event.level)
            case PhaseProgress():
                self._show_progress(event)
            case RunEnded():
                self._show_end(event)

    def close(self) -> None:
        """Ends the live display. Safe to call twice."""
        self._phase_lines.close()
        progress, self._progress = self._progress, None
        if progress is not None:
            progress.stop()

    def _show_start(self, event: RunStarted) -> None:
        self._model, self._folder, self._total_steps = (
            event.model,
            RunFolder(event.run_folder),
            event.total_steps,
        )
        share = event.trainable_parameters / max(1, event.total_parameters)
        resumed = f", resumed after step {event.first_step}" if event.first_step else ""
        nodes = f"{event.world_size}, batch shares: {event.shares}" if event.world_size > 1 else "1"
        rows = [
            ("model", event.model, "bold"),
            ("adapter", event.adapter, ""),
            ("trains", f"{millions(event.trainable_parameters)} of {millions(event.total_parameters)} M "
                       f"parameters ({share:.2%})", ""),
            ("data", f"{event.train_rows:,} rows to train, {event.valid_rows:,} to validate, "
                     f"{event.test_rows:,} to test", ""),
            ("steps", f"{event.total_steps:,} of {event.batch_size} rows{resumed}", ""),
            ("nodes", nodes, ""),
            ("device", event.device, ""),
            *([("weights", event.layout, "")] if event.layout else []),
            ("folder", str(short_path(event.run_folder)), ""),
        ]  # fmt: skip
        self._block("macft", rows, "blue")
        for note in event.notes:
            self._show_note(note, "info")
        if self._is_live:
            self._progress = _progress(self._console)
            self._training = self._progress.add_task(
                "training", total=event.total_steps, completed=event.first_step, detail=""
            )
            self._progress.start()

    def _show_step(self, event: StepDone) -> None:
        self._end_phase()
        self._speed.add(event.tokens, event.seconds)
        left = duration(self._speed.seconds_per_step * (event.total_steps - event.step))
        rate = f"{self._speed.tokens_per_second:,.0f} tokens/s"
        if self._progress is not None and self._training is not None:
            details = [f"loss {event.loss:.3f}", f"left {left}", rate, f"lr {event.learning_rate:.1e}"]
            self._progress.update(self._training, completed=event.step, detail=self._beside_bar(details))
        is_first, self._has_stepped = not self._has_stepped, True
        self._untold_seconds += event.seconds
        is_long = self._untold_seconds >= _LONGEST_SILENCE
        if is_first or is_long or event.step % self._every == 0 or event.step == event.total_steps:
            self._untold_seconds = 0.0
            fields = [
                self._position(event.step),
                f"loss {event.loss:6.3f}",
                f"lr {event.learning_rate:.2e}",
                f"grad {event.grad_norm:6.2f}",
                f"{rate:>14}",
                f"{self._speed.seconds_per_step:5.2f} s/step",
                f"left {left}",
            ]
            lines = [fields[:count] for count in (7, 6, 5)]  # the bar has the time that is left, and the speed
            in_one = [line for line in lines if len("  ".join(line)) <= self._console.width]
            self._fields(*(in_one[0] if self._is_live and in_one else fields))

    def _show_validation(self, event: Evaluated) -> None:
        self._end_phase()
        fields = [self._position(event.step), f"validation loss {event.loss:.3f}"]
        if not event.step:
            fields.append("before training")
        elif event.is_best:
            fields.append("best so far")
        self._fields(*fields, style="cyan")

    def _show_metric(self, event: MetricScored) -> None:
        self._end_phase()
        split = "validation" if event.split == "valid" else event.split
        score = f"{result_name(event.name)} {result_text(event.name, event.value)} of {event.count} {split} rows"
        self._fields(self._position(event.step), score, f"{event.when} training", style="cyan")

    def _show_samples(self, event: SamplesShown) -> None:
        self._end_phase()
        for number, sample in enumerate(event.samples, 1):
            self._block(f"sample {number} of {len(event.samples)}", sample_rows(sample), "dim")

    def _show_change(self, event: NodesChanged) -> None:
        self._end_phase()
        self._changes.append(event)
        self._text(f"{self._position(event.step)}  {printable(event.line)}", "yellow")

    def _show_note(self, text: str, level: str) -> None:
        mark = f"{level}: " if level in _NOTE_STYLES else "· "
        self._text(mark + printable(text), _NOTE_STYLES.get(level, "dim"))

    def _show_progress(self, event: PhaseProgress) -> None:
        if self._progress is None:
            if not self._is_live:
                self._show_progress_lines(event)
            return
        if self._phase is None or self._phase[0] != event.name:
            self._end_phase()
            self._phase = (event.name, self._progress.add_task(event.name, total=event.total, detail=""))
        self._progress.update(self._phase[1], completed=event.done, total=event.total)

    def _show_progress_lines(self, event: PhaseProgress) -> None:
        if self._phase_in_lines != event.name:
            self._phase_in_lines = event.name
            self._phase_lines.begin(event.name, event.total)
        self._phase_lines.advance(event.done)

    def _show_end(self, event: RunEnded) -> None:
        self.close()
        # The commands come below the panel and unbroken, so that they can be copied.
        title, colour = _TITLES.get(event.reason, (event.reason, ""))
        rows = [
            *result_rows(event),
            ("time", f"{event.steps:,} step{'' if event.steps == 1 else 's'}, {duration(event.seconds)}", ""),
        ]
        if self._speed.total_seconds:
            average = self._speed.total_tokens / self._speed.total_seconds
            rows.append(("speed", f"{average:,.0f} tokens/s on average", ""))
        if self._changes:
            lost, joined = (sum(len(getattr(event, what)) for event in self._changes) for what in ("left", "joined"))
            rows.append(("nodes", f"{lost} lost, {joined} joined, {len(self._changes[-1].names)} at the end", ""))
        if event.energy is not None:
            rows.append(("energy", event.energy.line, ""))
        if event.adapter_folder is not None:
            rows.append(("adapter", str(short_path(event.adapter_folder)), ""))
        self._block(title, rows, colour)
        for warning in event.warnings:
            self._show_note(warning, "warning")
        if event.detail and event.reason != "failed":  # of an error the command prints one line itself
            self._line(one_line(event.detail), colour)
        if event.adapter_folder is not None:
            self._line(f"try it: {command('python', '-m', 'macft.generate', short_path(self._folder.path))}")
            self._line(f"with mlx-lm: {self._generate(event.adapter_folder)}")
        if self._folder.curves:
            self._line(f"curves: {command('tensorboard', '--logdir', short_path(self._folder.logdir))}")

    def _position(self, step: int) -> str:
        width = len(str(self._total_steps))
        return f"step {step:>{width}}/{self._total_steps}"

    def _generate(self, adapter_folder: Path) -> str:
        if self._folder.model.is_dir():
            words: list[str | Path] = ["mlx_lm.generate", "--model", short_path(self._folder.model)]
        else:
            model = base_model(adapter_folder) or self._model
            words = [
                "mlx_lm.generate",
                "--model",
                short_path(Path(model)),
                "--adapter-path",
                short_path(adapter_folder),
            ]
        return f'{command(*words)} --prompt "..."'

    def _beside_bar(self, details: list[str]) -> str:
        """As many of ``details`` as leave room for the bar, its count and the longest name of a phase."""
        room = self._console.width - _PHASE_COLUMNS - _BAR_COLUMNS - 2 * len(str(self._total_steps)) - 1
        while details and len("  ".join(details)) > room:
            details = details[:-1]
        return "  ".join(details)

    def _line(self, text: str, style: str = "") -> None:
        """Unbroken: the terminal breaks it where it is full, and a command in it is copied as one."""
        self._console.print(Text(text, style=style), soft_wrap=True)

    def _fields(self, *fields: str, style: str = "") -> None:
        """Two spaces between each two of them; at a terminal as many in a line as fit."""
        line = fields[0]
        for field in fields[1:]:
            if self._is_live and len(line) + 2 + len(field) > self._console.width:
                self._line(line, style)
                line = f"  {field.lstrip()}"
            else:
                line += f"  {field}"
        self._line(line, style)

    def _text(self, text: str, style: str = "") -> None:
        """At a terminal broken between words, unless it has a command to copy."""
        if not self._is_live or "`" in text:
            self._line(text, style)
            return
        indent = "  " if self._console.width >= _NARROWEST_PANEL else ""
        lines = textwrap.wrap(
            text, self._console.width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
        for line in lines:
            self._line(line, style)

    def _block(self, title: str, rows: list[Row], colour: str) -> None:
        if self._is_live and self._console.width >= _NARROWEST_PANEL:
            grid = _grid(rows, self._console.width - _PANEL_EDGES)
            panel = Panel(grid, title=title, title_align="left", border_style=colour, box=box.ROUNDED)
            self._console.print(panel)
            return
        self._line(title)
        if self._is_live:  # too narrow for two columns: a panel would leave the texts out
            for label, text, _ in rows:
                self._line(f"  {label}")
                for line in textwrap.wrap(printable(text) or "-", max(8, self._console.width - 4)):
                    self._line(f"    {line}")
            return
        width = max(len(label) for label, _, _ in rows)
        for label, text, _ in rows:
            lines = textwrap.fill(
                printable(text) or "-",
                _PLAIN_WIDTH,
                initial_indent=f"  {label:<{width}}  ",
                subsequent_indent=" " * (width + 4),
                break_long_words=False,
                break_on_hyphens=False,
            )
            self._line(lines)

    def _end_phase(self) -> None:
        if self._progress is not None and self._phase is not None:
            self._progress.remove_task(self._phase[1])
            self._progress.refresh()
        self._phase_lines.end()
        self._phase = self._phase_in_lines = None


class _Output(Console):
    """Rich ends the process when the output is no longer read (``| head``); training has to go on."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError("the output is no longer read")


class _Speed:
    """Seconds and tokens of a step as exponential averages, so that the time left doesn't jump."""

    def __init__(self) -> None:
        self.total_tokens, self.total_seconds = 0, 0.0
        self._weight, self._tokens, self._seconds = 0.0, 0.0, 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self.total_tokens += tokens
        self.total_seconds += seconds
        keep = 1 - _SMOOTHING
        self._weight = keep * self._weight + _SMOOTHING
        self._tokens = keep * self._tokens + _SMOOTHING * tokens
        self._seconds = keep * self._seconds + _SMOOTHING * seconds

    @property
    def seconds_per_step(self) -> float:
        return self._seconds / self._weight

    @property
    def tokens_per_second(self) -> float:
        return self._tokens / max(self._seconds, 1e-9)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=_BAR_COLUMNS)),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[detail]}", markup=False),
        console=console,
        transient=True,
        expand=True,
        refresh_per_second=4,
    )


def _grid(rows: list[Row], width: int) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    width -= 2 + max(len(label) for label, _, _ in rows)
    for label, text, style in rows:
        grid.add_row(label, Text(with_broken_path(printable(text), width), style=style))
    return grid
