"""``metrics.jsonl``: every event of a run, one JSON object a line."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from macft.device.durable import write_atomically
from macft.report.events import Event, NodesChanged, SamplesShown, StepDone

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
"""What ``json.dumps`` writes."""


class MetricsFile:
    """Appends events to ``path``: ``type``, ``time`` (seconds since 1970) and the event's fields.

    Each line is flushed as it is written. A run that resumes after ``first_step`` updates first removes what an
    earlier attempt wrote beyond that step, so that each step is in the file once.

    Raises:
        OSError: the file can't be read or written; also from every event.
    """

    def __init__(self, path: Path, *, first_step: int):
        if path.exists():
            write_atomically(path, "".join(_kept_lines(path, first_step)))
        self._file = path.open("a", encoding="utf-8")

    def handle(self, event: Event) -> None:
        """Writes the event, unless its class says that it is not recorded."""
        if event.is_recorded:
            values = {"type": event.type_name, "time": time.time(), **_fields(event)}
            self._file.write(json.dumps(plain(values), allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def last_recorded_step(path: Path) -> int:
    """The last step in the metrics file ``path``; 0 if there is none."""
    steps = [event.get("step") for _, event in _events(path) if event.get("type") == StepDone.type_name]
    return max((step for step in steps if isinstance(step, int)), default=0)


def recorded_changes(path: Path, until: int) -> list[NodesChanged]:
    """The changes of the nodes in the metrics file ``path`` up to those after step ``until``."""
    names = {item.name for item in dataclasses.fields(NodesChanged)}
    return [
        NodesChanged(**{name: event[name] for name in names})
        for _, event in _events(path)
        if event.get("type") == NodesChanged.type_name and event.keys() >= names and not _is_repeated(event, until)
    ]


def plain(value: object) -> Json:
    """``value`` in JSON's types. What JSON lacks becomes a string: ``"nan"``, ``"inf"``, a path."""
    if value is None or isinstance(value, bool | str):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(_fields(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):  # NumPy's scalars included
        number = float(value)
        return number if math.isfinite(number) else str(number)
    return str(value)


def _fields(instance: DataclassInstance) -> dict[str, object]:
    keys = {item.name: item.metadata.get("recorded_as", item.name) for item in dataclasses.fields(instance)}
    return {key: getattr(instance, name) for name, key in keys.items() if key is not None}


def _events(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a metrics file that hold an event, and the events; the others were torn by a kill."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            yield line, event


def _kept_lines(path: Path, first_step: int) -> list[str]:
    """The lines that a run resuming after ``first_step`` won't write again."""
    return [line + "\n" for line, event in _events(path) if not _is_repeated(event, first_step)]


def _is_repeated(event: Mapping[str, Any], first_step: int) -> bool:
    """Whether a run resuming after ``first_step`` will write this event again."""
    step = event.get("step")
    if not isinstance(step, int):
        return False
    # Without a checkpoint the start is done again too; the end, its answers and its score, always is.
    is_of_the_end = event.get("type") == SamplesShown.type_name or event.get("when") == "after"
    return step > first_step or first_step == 0 or is_of_the_end
