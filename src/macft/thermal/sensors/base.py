"""The interface of a sensor, and how the ones that ask another program do so."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from typing import Protocol

from macft.thermal.readings import Reading

_MOST_OUTPUT = 1 << 20
COMMAND_SECONDS = 5.0


class SensorError(Exception):
    """A sensor isn't there or can't be understood; the text says why in a few words."""


class Sensor(Protocol):
    """Reads some kinds of values. A call may take its time or hang: each sensor has a thread of its own."""

    @property
    def name(self) -> str:
        """The source, as it stands in every reading."""
        ...

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of reading it can give; it is only asked while no more trusted sensor gives them all."""
        ...

    def read(self) -> list[Reading]:
        """What is known now; raises SensorError, or anything else, where nothing is."""
        ...

    def close(self) -> None:
        """Releases what the sensor holds. Safe to call twice."""
        ...


def now() -> float:
    """Seconds of the clock that real sensors stamp their readings with."""
    return time.monotonic()


def output_of(command: Sequence[str], *, seconds: float = COMMAND_SECONDS) -> bytes:
    """Standard output of a command, its first MiB; raises SensorError where it is missing, fails or takes longer."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=seconds
        )
    except FileNotFoundError:
        raise SensorError(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise SensorError(f"{command[0]} did not answer within {seconds:g} s") from None
    except OSError as error:
        raise SensorError(f"{command[0]}: {error.strerror or error}") from None
    if done.returncode:
        raise SensorError(f"{command[0]} ended with status {done.returncode}")
    return done.stdout[:_MOST_OUTPUT]
