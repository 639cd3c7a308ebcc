"""Chooses the sensors of this machine, the most trusted first."""

from __future__ import annotations

import sys
from collections.abc import Callable

from macft.thermal.load import Load
from macft.thermal.sensors.base import Sensor, SensorError
from macft.thermal.sensors.linux import Battery, LinuxTemperature, Rapl
from macft.thermal.sensors.macmon import MacmonLibrary, MacmonPipe
from macft.thermal.sensors.macos_state import ProcessInfoState, ThermalPressure
from macft.thermal.sensors.pmset import Pmset
from macft.thermal.sensors.powermetrics import Powermetrics
from macft.thermal.sensors.simulated import AssumedPower, SimulatedSensor
from macft.thermal.sensors.zeus import Zeus
from macft.thermal.settings import ThermalConfig

Maker = Callable[[], Sensor]

_MACOS: tuple[Maker, ...] = (
    MacmonLibrary, MacmonPipe, Zeus, ThermalPressure, ProcessInfoState, Powermetrics, Pmset, Battery
)  # fmt: skip
_LINUX: tuple[Maker, ...] = (LinuxTemperature, Rapl, Battery)


def choose(config: ThermalConfig, load: Load, *, rank: int) -> tuple[list[Sensor], list[str]]:
    """The sensors of this machine, and for each of the others the reason why it can't be used."""
    makers: list[Maker] = []
    system = {"darwin": "macos", "linux": "linux"}.get(sys.platform, "") if config.sensor == "auto" else config.sensor
    if system == "macos":
        makers += _MACOS
    elif system == "linux":
        makers += _LINUX
    elif system == "simulated":
        makers.append(lambda: SimulatedSensor(config.simulated, load, rank=rank))
    if config.assumed_watts is not None and system != "simulated":
        watts = config.assumed_watts
        makers.append(lambda: AssumedPower(watts, load))
    sensors, missing = [], []
    for make in makers:
        try:
            sensors.append(make())
        except SensorError as error:
            missing.append(str(error))
        except Exception as error:  # a package may raise anything when it starts
            missing.append(f"{getattr(make, 'name', 'a sensor')}: {error}")
    return sensors, missing
