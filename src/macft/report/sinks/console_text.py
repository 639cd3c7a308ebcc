"""What the terminal shows as text: rows of its panels, paths, and texts that may hold anything."""

from __future__ import annotations

import json
from pathlib import Path

from macft.report.events import RunEnded, Sample
from macft.report.result_text import result_name, result_text

_LONGEST_TEXT = 480

Row = tuple[str, str, str]
"""A label, its text and the text's style."""


def sample_rows(sample: Sample) -> list[Row]:
    """A question, the right answer, and those of the model before and after training."""
    rows = [("question", _shortened(sample.prompt), "bold"), ("expected", _shortened(sample.expected), "")]
    for label, answer, correct in (
        ("before", sample.before, sample.before_correct),
        ("after", sample.after, sample.after_correct),
    ):
        if answer is not None:
            mark, style = {True: ("✓ ", "green"), False: ("✗ ", "red"), None: ("", "")}[correct]
            rows.append((label, mark + (_shortened(answer) or "(nothing)"), style))
    return rows


def result_rows(event: RunEnded) -> list[Row]:
    """The final losses and metrics, each with its value before training where that is known."""
    rows = []
    for name, value in event.final.items():
        if name.endswith("_before") and name.removesuffix("_before") in event.final:
            continue  # shown in the row of its name
        shown = result_text(name, value)
        if (before := event.final.get(f"{name}_before")) is not None:
            shown = f"{result_text(name, before)} → {shown}"
        rows.append((result_name(name), shown, "bold"))
    return rows


def with_broken_path(text: str, width: int) -> str:
    """``text``, or where it is a path of more than ``width`` columns, its lines: broken after a ``/``."""
    if " " in text:
        return text
    lines = []
    while len(text) > width and (end := text.rfind("/", 0, width) + 1):
        lines.append(text[:end])
        text = text[end:]
    return "\n".join([*lines, text])


def short_path(path: Path) -> Path:
    """A path as one would type it here: below the working folder or the home folder without what leads there."""
    for base, prefix in ((Path.cwd(), Path()), (Path.home(), Path("~"))):
        if path.is_absolute() and path.is_relative_to(base) and path != base:
            short = prefix / path.relative_to(base)
            return path if str(short).startswith("~") and prefix == Path() else short
    return path


def base_model(adapter_folder: Path) -> str | None:
    """What the adapter belongs to, as its own file says: a bundled model's name means nothing to mlx-lm."""
    try:
        name = json.loads((adapter_folder / "adapter_config.json").read_text(encoding="utf-8")).get("model")
    except (OSError, ValueError, AttributeError):
        return None
    return name if isinstance(name, str) else None


def printable(text: str) -> str:
    """One line without control characters: an untrained model's answer may hold any."""
    return "".join(letter if letter.isprintable() else "�" for letter in " ".join(text.split()))


def one_line(text: str) -> str:
    """The same, with each space of the commands in it: the names of folders hold any."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _shortened(text: str) -> str:
    """Without its middle if it is very long: a schema comes first and the question last."""
    line = printable(text)
    half = _LONGEST_TEXT // 2
    return line if len(line) <= _LONGEST_TEXT else f"{line[:half]} ... {line[-half:]}"


def millions(count: int) -> str:
    """``count`` in millions, with two decimals."""
    return f"{count / 1e6:,.2f}"
