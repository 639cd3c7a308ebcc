"""The interface of a sensor, and how a sensor runs another program."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from typing import Protocol

from macft.thermal.readings import Reading

_MOST_OUTPUT = 1 << 20
COMMAND_SECONDS = 5.0


class SensorError(Exception):
    """A sensor does not exist or gives unknown output; the text is a short reason."""


class Sensor(Protocol):
    """Reads some kinds of values. A call may block: each sensor has its own thread."""

    @property
    def name(self) -> str:
        """The source, as in every reading."""
        ...

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of reading it can give; it is read only while no more trusted sensor gives them all."""
        ...

    def read(self) -> list[Reading]:
        """The current readings; raises SensorError, or any other exception, if there are none."""
        ...

    def close(self) -> None:
        """Releases what the sensor holds. Safe to call twice."""
        ...


def now() -> float:
    """The time of real sensors' readings, in seconds of the monotonic clock."""
    return time.monotonic()


def output_of(command: Sequence[str], *, seconds: float = COMMAND_SECONDS) -> bytes:
    """The first MiB of a command's standard output; raises SensorError if it is missing, fails or takes too long."""
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
