"""Reads events back from ``metrics.jsonl``: the inverse of :mod:`macft.report.sinks.metrics_file`."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from macft.report.events import Event, ReplayedEvent
from macft.report.growing_file import GrowingFile


def events_in(path: Path) -> Iterator[Event]:
    """The events in a metrics file; none where there is no file."""
    if path.is_file():
        yield from EventReader(path).read()


class EventReader:
    """Reads a metrics file that grows: the events from ``since`` on, in seconds since 1970."""

    def __init__(self, path: Path, *, since: float = 0.0):
        self._file, self._since = GrowingFile(path), since

    def read(self) -> list[Event]:
        """The events that were written since the last call. Lines that a kill has torn are left out."""
        events: list[Event] = []
        while lines := self._file.read():
            events += [event for line in lines if (event := _event(line, self._since)) is not None]
        return events


def _event(line: bytes, since: float) -> Event | None:
    try:
        values = json.loads(line)
        if values["time"] < since:
            return None
        made = _made(_KINDS[values["type"]], values)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    assert isinstance(made, Event)
    return made


def _made(kind: type, values: Mapping[str, Any]) -> Any:
    """A dataclass of ``values``. Raises KeyError where one that it needs is missing."""
    hints = get_type_hints(kind)
    arguments = {}
    for item in fields(kind):
        name = item.metadata.get("recorded_as", item.name)
        if name in values:
            arguments[item.name] = _value(hints[item.name], values[name])
        elif name is None:
            arguments[item.name] = ""
        elif item.default is MISSING and item.default_factory is MISSING:
            raise KeyError(item.name)
    return kind(**arguments)


def _value(hint: Any, value: Any) -> Any:
    """``value`` of JSON as a value of the type ``hint``."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return None if value is None else _value(next(item for item in inner if item is not type(None)), value)
    if origin is list:
        return [_value(inner[0], item) for item in value]
    if origin is not None:  # a mapping
        return {key: _value(inner[1], item) for key, item in value.items()}
    if is_dataclass(hint):
        assert isinstance(hint, type)
        return _made(hint, value)
    if hint is float:  # JSON has no infinity; the file has it as a text
        return float(value)
    return Path(value) if hint is Path else value


def _subclasses(kind: type[Event]) -> Iterator[type[Event]]:
    for each in kind.__subclasses__():
        yield each
        yield from _subclasses(each)


_KINDS = {kind.type_name: kind for kind in _subclasses(Event) if kind is not ReplayedEvent}
