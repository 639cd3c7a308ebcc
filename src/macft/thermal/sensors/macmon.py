"""macmon: temperature and power of an Apple chip without sudo, through macmon-lib or the ``macmon`` program."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from typing import Any

from macft.thermal.readings import Reading, reading
from macft.thermal.sensors.base import SensorError, now, output_of


class MacmonLibrary:
    """``macmon.Sampler`` of the package macmon-lib (the package ``macmon`` is unrelated)."""

    name = "macmon"
    kinds: tuple[str, ...] = ("temperature", "watts")

    def __init__(self) -> None:
        try:
            macmon: Any = importlib.import_module("macmon")
            self._sampler = macmon.Sampler().__enter__()
        except (ImportError, AttributeError):
            raise SensorError("macmon-lib is not installed") from None

    def read(self) -> list[Reading]:
        metrics = self._sampler.metrics()
        temperature, power = metrics.temperature, metrics.power
        return _readings(
            [temperature.cpu_average, temperature.gpu_average],
            [power.board, power.package],
            self.name,
        )

    def close(self) -> None:
        sampler, self._sampler = self._sampler, None
        if sampler is not None:
            sampler.__exit__(None, None, None)


class MacmonPipe:
    """``macmon pipe -s 1``, for machines with the program but not the package."""

    name = "macmon pipe"
    kinds: tuple[str, ...] = ("temperature", "watts")

    def read(self) -> list[Reading]:
        return parse_pipe(output_of(["macmon", "pipe", "-s", "1", "-i", "500"]), self.name)

    def close(self) -> None:
        """Nothing to release."""


def parse_pipe(output: bytes, source: str) -> list[Reading]:
    """Readings of the last line of ``macmon pipe``; raises SensorError if it is not the expected JSON."""
    lines = output.strip().splitlines()
    try:
        values = json.loads(lines[-1])
        temperature, power = values["temp"], [values.get("sys_power"), values.get("all_power")]
        temperatures = [temperature.get("cpu_temp_avg"), temperature.get("gpu_temp_avg")]
    except (IndexError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise SensorError("macmon printed something unknown") from None
    return _readings(temperatures, power, source)


def _readings(temperatures: Sequence[object], watts: Sequence[object], source: str) -> list[Reading]:
    """The higher temperature; the power of the whole machine, or of the chip if that is missing."""
    time = now()
    hottest = [item for value in temperatures for item in reading("temperature", _number(value), time, source)]
    temperature = [max(hottest, key=lambda item: item.value)] if hottest else []
    power = [item for value in watts for item in reading("watts", _number(value), time, source)]
    return temperature + power[:1]


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9 else None
