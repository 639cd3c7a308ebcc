"""The terminal: a header, live progress, a line now and then, and the result side by side."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from macft.report.events import (
    CheckpointSaved,
    Evaluated,
    MetricScored,
    Noted,
    PhaseProgress,
    RunEnded,
    RunStarted,
    SamplesShown,
    SilentReporter,
    StepDone,
)

_PLAIN_WIDTH = 100
_TITLES = {
    "finished": ("Finished", "green"),
    "early_stopped": ("Stopped early: the validation loss no longer falls", "green"),
    "interrupted": ("Interrupted; everything so far is saved", "yellow"),
    "failed": ("Failed", "red"),
}


class ConsoleReporter(SilentReporter):
    """Prints through rich; off a terminal plain lines without control codes, so that logs stay readable."""

    def __init__(self, *, every: int, console: Console | None = None):
        self._console = console or Console(highlight=False)
        if not self._console.is_terminal:
            self._console.width = max(self._console.width, _PLAIN_WIDTH)
        self._every = every
        self._progress: Progress | None = None
        self._training: TaskID | None = None
        self._phase: tuple[str, TaskID] | None = None
        self._model = ""
        self._run_folder = Path()
        self._tokens, self._seconds = 0, 0.0

    def run_started(self, event: RunStarted) -> None:
        """The header."""
        self._model, self._run_folder = event.model, event.run_folder
        share = 100 * event.trainable_parameters / max(1, event.total_parameters)
        rows = [
            ("model", event.model),
            ("adapter", f"{event.adapter}: {event.trainable_parameters / 1e6:.2f} M parameters ({share:.2f} %)"),
            ("data", f"{event.train_rows} rows to train, {event.valid_rows} to validate, {event.test_rows} to test"),
            ("steps", f"{event.total_steps} of {event.batch_size} rows" + _from(event.first_step)),
            ("nodes", str(event.world_size)),
            ("device", event.device),
            ("folder", str(event.run_folder)),
        ]
        self._console.print(Panel(_grid(rows), title="macft", title_align="left", border_style="dim"))
        for note in event.notes:
            self.noted(Noted(note))
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}"),
                console=self._console,
                transient=True,
                speed_estimate_period=120,
            )
            self._progress.start()
            self._training = self._progress.add_task(
                "training", total=event.total_steps, completed=event.first_step, detail=""
            )

    def step_done(self, event: StepDone) -> None:
        """The bar, and a line every so many steps."""
        self._tokens += event.tokens
        self._seconds += event.seconds
        rate = event.tokens / max(event.seconds, 1e-9)
        if self._progress is not None and self._training is not None:
            detail = f"loss {event.loss:.3f}  {rate:.0f} tokens/s"
            self._progress.update(self._training, completed=event.step, detail=detail)
        if event.step % self._every == 0 or event.step == event.total_steps:
            average = self._tokens / max(self._seconds, 1e-9)
            remaining = (event.total_steps - event.step) * event.seconds
            self._console.print(
                f"step {event.step:>5}/{event.total_steps}  loss {event.loss:6.3f}  lr {event.learning_rate:.2e}  "
                f"grad {event.grad_norm:6.2f}  {average:6.0f} tokens/s  {event.seconds:5.2f} s/step  "
                f"left {_duration(remaining)}"
            )
            self._tokens, self._seconds = 0, 0.0

    def evaluated(self, event: Evaluated) -> None:
        """The validation loss."""
        self._end_phase()
        best = "  best so far" if event.is_best and event.step else ""
        self._console.print(
            f"step {event.step:>5}  validation loss {event.loss:.3f}  ({event.seconds:.1f} s){best}", style="cyan"
        )

    def metric_scored(self, event: MetricScored) -> None:
        """The metric."""
        self._end_phase()
        name = event.name.replace("_", " ")
        self._console.print(
            f"{event.when} training: {name} {event.value:.1%} of {event.count} {event.split} rows ({event.seconds:.1f} s)",
            style="cyan",
        )

    def samples_shown(self, event: SamplesShown) -> None:
        """Answers side by side."""
        self._end_phase()
        for sample in event.samples:
            answers = [("expected", Text(sample.expected))]
            if sample.before is not None:
                answers.append(("before", _answer(sample.before, sample.before_correct)))
            if sample.after is not None:
                answers.append(("after", _answer(sample.after, sample.after_correct)))
            question = Text(sample.prompt.strip(), style="bold")
            self._console.print(question, _grid(answers), "", sep="\n")

    def checkpoint_saved(self, event: CheckpointSaved) -> None:
        """Only said where somebody may look for it: checkpoints are routine."""

    def noted(self, event: Noted) -> None:
        """One line."""
        style = {"warning": "yellow", "error": "red"}.get(event.level, "dim")
        self._console.print(Text(f"· {event.text}", style=style))

    def phase_progress(self, event: PhaseProgress) -> None:
        """A second bar while evaluating."""
        if self._progress is None:
            return
        if self._phase is None or self._phase[0] != event.name:
            self._end_phase()
            self._phase = (event.name, self._progress.add_task(event.name, total=event.total, detail=""))
        self._progress.update(self._phase[1], completed=event.done, total=event.total)

    def _end_phase(self) -> None:
        if self._progress is not None and self._phase is not None:
            self._progress.remove_task(self._phase[1])
        self._phase = None

    def run_ended(self, event: RunEnded) -> None:
        """The closing panel: what came of it and how to use it."""
        self.close()
        title, colour = _TITLES[event.reason]
        rows = [("steps", f"{event.steps} in {_duration(event.seconds)}")]
        for name, value in event.final.items():
            if name.endswith("_before"):
                continue
            before = event.final.get(f"{name}_before")
            is_loss = name.endswith("loss")
            shown = f"{value:.3f}" if is_loss else f"{value:.1%}"
            if before is not None:
                shown = f"{before:.3f} → {shown}" if is_loss else f"{before:.1%} → {shown}"
            rows.append((name.replace("_", " "), shown))
        if event.adapter_folder is not None:
            rows.append(("adapter", str(event.adapter_folder)))
            rows.append(
                ("try it", f"mlx_lm.generate --model {self._model} --adapter-path {event.adapter_folder} --prompt ...")
            )
        rows.append(("curves", f"tensorboard --logdir {self._run_folder}"))
        if event.detail:
            rows.append(("", event.detail))
        self._console.print(Panel(_grid(rows), title=title, title_align="left", border_style=colour))

    def close(self) -> None:
        """Ends the live display."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _grid(rows: list[tuple[str, str]] | list[tuple[str, Text]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(name, value if isinstance(value, Text) else Text(value))
    return grid


def _answer(text: str, correct: bool | None) -> Text:
    mark, style = {True: ("✓ ", "green"), False: ("✗ ", "red"), None: ("", "")}[correct]
    shown = " ".join(text.split())
    return Text(mark + (shown if len(shown) <= 160 else shown[:157] + "..."), style=style)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _from(first_step: int) -> str:
    return f", resumed after step {first_step}" if first_step else ""
