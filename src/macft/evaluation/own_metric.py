"""A metric of the user's own: a function named by its dotted path."""

from __future__ import annotations

import importlib
import inspect
import math
import numbers
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from macft.data.formats import Record
from macft.errors import ConfigError, DataError


class OwnMetric:
    """Calls ``function(answer, expected)`` or ``function(answer, expected, row)`` for each answer.

    It returns a number, or a bool where answers are right or wrong; more is better. ``row`` is the row as a dict, as it
    was read. The module is looked for in ``folder`` first, then among the installed packages.

    Raises:
        ConfigError: There is no such function, its module can't be imported, or it doesn't take these arguments.
    """

    def __init__(self, path: str, folder: Path):
        self.path = path
        self._function = _imported(path, folder)
        self._takes_row = _takes_row(path, self._function)

    def score(self, answer: str, expected: str, record: Record) -> float | bool:
        """What the function returns for the answer.

        Raises:
            DataError: It raises an exception, or returns anything but a finite number or a bool.
        """
        row = (dict(record),) if self._takes_row else ()
        try:
            value = self._function(answer, expected, *row)
            return _number(value)
        except Exception as error:  # the user's own code may raise anything
            raise DataError(f"{self._trouble(error)} for the answer {_short(answer)}") from error

    def _trouble(self, error: Exception) -> str:
        text = " ".join(str(error).split())
        if isinstance(error, _WrongValue):
            return f"dataset.metric: {self.path} returned {text}; it must return a finite number, or True or False,"
        frames = inspect.getinnerframes(error.__traceback__) if error.__traceback__ is not None else []
        where = f", {Path(frames[-1].filename).name} line {frames[-1].lineno}" if frames else ""
        return f"dataset.metric: {self.path} raised {type(error).__name__}{': ' if text else ''}{text}{where},"


class _WrongValue(Exception):
    """A function has returned something that is no score; the message is what it returned."""


def is_dotted(name: str) -> bool:
    """Whether ``name`` has the form of a dotted path to a function."""
    parts = name.split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts)


def _imported(path: str, folder: Path) -> Callable[..., Any]:
    module_name, _, name = path.rpartition(".")
    sys.path.insert(0, str(folder))
    try:
        importlib.invalidate_caches()
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise _not_imported(module_name, error) from error  # it imports something that is missing
        raise ConfigError(
            f"dataset.metric: there is no module {error.name} for {path}, neither in {folder} nor installed; go to the "
            "folder that has it, or set dataset.metric_folder"
        ) from error
    except Exception as error:
        raise _not_imported(module_name, error) from error
    finally:
        sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))  # for what the function itself imports
    function = getattr(module, name, None)
    if not callable(function):
        what = "is no function" if hasattr(module, name) else "does not exist"
        raise ConfigError(f"dataset.metric: {path} {what}; the module is {getattr(module, '__file__', module_name)}")
    return function  # type: ignore[no-any-return]


def _not_imported(module_name: str, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())
    return ConfigError(f"dataset.metric: importing {module_name} raised {type(error).__name__}: {reason}")


def _takes_row(path: str, function: Callable[..., Any]) -> bool:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a built-in function that doesn't tell
        return False
    for count in (3, 2):
        try:
            signature.bind(*[None] * count)
        except TypeError:
            continue
        return count == 3
    raise ConfigError(f"dataset.metric: {path}{signature} must take (answer, expected) or (answer, expected, row)")


def _number(value: Any) -> float | bool:
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:  # a scalar of NumPy or MLX
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise _WrongValue(f"{_short(value)} ({type(value).__name__})" if value is not None else "None")
    if not math.isfinite(value):
        raise _WrongValue(str(float(value)))
    return float(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
