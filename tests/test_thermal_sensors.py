"""Parsers on samples of the real formats and on anything else; sensors that fail never hold anything up."""

from __future__ import annotations

import json
import plistlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.waiting import wait_until
from macft.thermal.load import Load
from macft.thermal.notices import missing_readings
from macft.thermal.readings import Conditions, Reading, combine, reading
from macft.thermal.sampler import Sampler
from macft.thermal.sensors.base import SensorError, now, output_of
from macft.thermal.sensors.choose import choose
from macft.thermal.sensors.linux import LinuxTemperature, Rapl
from macft.thermal.sensors.macmon import parse_pipe
from macft.thermal.sensors.macos_state import parse_pressure
from macft.thermal.sensors.pmset import parse_battery, parse_modes
from macft.thermal.sensors.powermetrics import parse_plist
from macft.thermal.settings import ThermalConfig

MACMON = (
    b'{"timestamp":"2025-02-24T20:38:15.427569+00:00","temp":{"cpu_temp_avg":43.73614,"gpu_temp_avg":36.95167},'
    b'"memory":{"ram_total":25769803776,"ram_usage":20985479168,"swap_total":4294967296,"swap_usage":2602434560},'
    b'"fans":[{"name":"fan0","rpm":999,"max_rpm":4900}],"gpu_freq_mhz":461,"gpu_active_ratio":0.09,"cpu_power":0.2,'
    b'"gpu_power":0.017,"ane_power":0.0,"all_power":0.22,"sys_power":5.87,"ram_power":0.116,"gpu_ram_power":0.00096}\n'
)


def values(readings: list[Reading]) -> dict[str, float]:
    return {item.kind: item.value for item in readings}


def test_macmon() -> None:
    assert values(parse_pipe(MACMON, "macmon")) == {"temperature": 43.73614, "watts": 5.87}
    old = {"temp": {"cpu_temp_avg": 50.0, "gpu_temp_avg": 5.0}, "all_power": 12.5, "gpu_usage": [461, 0.02]}
    # 5 C is a known wrong value of the GPU's, and this version has no sys_power.
    assert values(parse_pipe(json.dumps(old).encode(), "macmon")) == {"temperature": 50.0, "watts": 12.5}
    silent = {"temp": {"cpu_temp_avg": 0.0, "gpu_temp_avg": 9.8}, "all_power": 0.0, "sys_power": 0}
    assert parse_pipe(json.dumps(silent).encode(), "macmon") == []


def test_powermetrics() -> None:
    sample = {
        "elapsed_ns": 500_000_000,
        "thermal_pressure": "Heavy",
        "processor": {"cpu_energy": 5000, "gpu_energy": 9000.0, "ane_energy": 0, "clusters": []},
        "gpu": {"freq_hz": 1398.0, "idle_ratio": 0.1},
    }
    output = plistlib.dumps({"elapsed_ns": 1}) + b"\0" + plistlib.dumps(sample) + b"\0\n"
    assert values(parse_plist(output, "powermetrics")) == {"state": 2, "watts": 28.0}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (" -InternalBattery-0 (id=21758051)\t87%; discharging; 0:52 remaining present: true", 87),
        (" -InternalBattery-0 (id=21758051)\t90%; charging; (no estimate) present: true", 90),
        (" -InternalBattery-0 (id=21758051)\t80%; AC attached; not charging present: true", 80),
        (" -InternalBattery-0 (id=21758051)\t90%; charged; 0:00 remaining present: true", 90),
    ],
)
@pytest.mark.parametrize(("source", "away"), [("AC Power", 0), ("Battery Power", 1)])
def test_pmset_battery(line: str, expected: int, source: str, away: int) -> None:
    output = f"Now drawing from '{source}'\n{line}\n".encode()
    assert values(parse_battery(output, "pmset")) == {"on_battery": away, "battery": expected}


def test_pmset_of_a_desktop_and_its_modes() -> None:
    assert values(parse_battery(b"Now drawing from 'AC Power'\n", "pmset")) == {"on_battery": 0}
    assert values(parse_battery(b"No batteries available.\n", "pmset")) == {"on_battery": 0}
    assert values(parse_modes(b"Currently in use:\n lowpowermode         1\n", "pmset")) == {"low_power": 1}
    assert values(parse_modes(b"Currently in use:\n powermode            2\n", "pmset")) == {"low_power": 0}
    assert parse_modes(b"sleep 1\n", "pmset") == []


def test_thermal_pressure() -> None:
    assert parse_pressure(b"com.apple.system.thermalpressurelevel 2\n") == 2
    with pytest.raises(SensorError, match="not from 0 to 4"):
        parse_pressure(b"com.apple.system.thermalpressurelevel 17\n")


PARSERS: list[tuple[Callable[[bytes], object], bytes]] = [
    (lambda text: parse_pipe(text, "x"), MACMON),
    (lambda text: parse_plist(text, "x"), plistlib.dumps({"processor": {"cpu_energy": 1}, "elapsed_ns": 10**9})),
    (lambda text: parse_battery(text, "x"), b"Now drawing from 'AC Power'\n -InternalBattery-0 (id=1)\t87%; charged"),
    (lambda text: parse_modes(text, "x"), b" lowpowermode 1\n"),
    (parse_pressure, b"com.apple.system.thermalpressurelevel 2\n"),
]


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(data=st.data(), which=st.sampled_from(range(len(PARSERS))))
def test_parsers_take_anything(data: st.DataObject, which: int) -> None:
    parse, sample = PARSERS[which]
    noise = data.draw(st.binary(max_size=30))
    place, cut = data.draw(st.integers(0, len(sample))), data.draw(st.integers(0, 20))
    for text in (noise, sample[:place] + noise + sample[place + cut :]):
        try:
            found = parse(text)
        except SensorError:
            continue
        for item in found if isinstance(found, list) else []:
            assert item.kind in ("temperature", "state", "watts", "battery", "on_battery", "low_power")


@given(value=st.floats(allow_nan=True, allow_infinity=True))
def test_a_reading_is_plausible_or_not_there(value: float) -> None:
    assert all(10 <= item.value <= 130 for item in reading("temperature", value, 0.0, "x"))


def test_linux_zones_and_rapl_that_wraps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.sensors_temperatures", dict, raising=False)
    for number, value in enumerate(("45000", "61500", "nonsense", "5000")):
        zone = tmp_path / f"class/thermal/thermal_zone{number}"
        zone.mkdir(parents=True)
        (zone / "temp").write_text(value)
    assert values(LinuxTemperature(tmp_path).read()) == {"temperature": 61.5}
    package = tmp_path / "class/powercap/intel-rapl:0"
    package.mkdir(parents=True)
    (package / "max_energy_range_uj").write_text("1000000000")
    (package / "energy_uj").write_text("999000000")
    rapl = Rapl(tmp_path)
    before = now()
    assert rapl.read() == []
    time.sleep(0.05)
    (package / "energy_uj").write_text("4000000")  # 5 J later, beyond the end of the counter
    found = values(rapl.read())
    assert 5 / (now() - before) <= found["watts"] <= 5 / 0.05


def test_a_machine_without_sensors_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.sensors_temperatures", dict, raising=False)
    for sensor in (LinuxTemperature(tmp_path), Rapl(tmp_path)):
        with pytest.raises(SensorError, match="this machine shows no"):
            sensor.read()


def test_macs_sensors_are_missing_with_a_reason_elsewhere() -> None:
    sensors, missing = choose(ThermalConfig(sensor="macos"), Load(), rank=0)
    assert "pmset" in [sensor.name for sensor in sensors]
    assert missing == [] or any("not installed" in reason for reason in missing)


def test_a_command_that_is_missing_fails_or_hangs_has_a_reason() -> None:
    for command, reason in (
        (["no-such-program-here"], "is not installed"),
        (["false"], "ended with status 1"),
        (["sleep", "30"], "did not answer within"),
    ):
        with pytest.raises(SensorError, match=reason):
            output_of(command, seconds=2.0)


class Fake:
    """A sensor that does what it is told."""

    def __init__(self, name: str, kinds: tuple[str, ...], read: Callable[[], list[Reading]]):
        self.name, self.kinds, self.read = name, kinds, read
        self.closed = threading.Event()

    def close(self) -> None:
        self.closed.set()


def good(kind: str, value: float, source: str) -> Callable[[], list[Reading]]:
    return lambda: reading(kind, value, now(), source)


def test_the_next_source_takes_over_and_failures_are_told_once() -> None:
    works = threading.Event()
    works.set()

    def fragile() -> list[Reading]:
        if not works.is_set():
            raise ValueError("burnt\nout")
        return reading("temperature", 50.0, now(), "first")

    first, second = (
        Fake("first", ("temperature",), fragile),
        Fake("second", ("temperature",), good("temperature", 60, "second")),
    )
    seen: list[Conditions] = []
    sampler = Sampler([first, second], interval=0.02, on_tick=seen.append)
    sampler.start()
    try:
        wait_until(lambda: any(item.temperature == 50 for item in seen))
        works.clear()
        wait_until(lambda: bool(seen) and seen[-1].temperature == 60)
        works.set()
        wait_until(lambda: seen[-1].temperature == 50)
        works.clear()
        wait_until(lambda: seen[-1].temperature == 60)
        assert sampler.notes() == ["thermal: no temperature from first: burnt out"]
        assert sampler.notes() == []
    finally:
        sampler.close()
    assert first.closed.wait(60)


@pytest.mark.slow
def test_a_sensor_that_hangs_holds_nobody_up() -> None:
    release = threading.Event()

    def hang() -> list[Reading]:
        release.wait()
        return []

    seen: list[Conditions] = []
    sensors = [Fake("stuck", ("temperature", "watts"), hang), Fake("fine", ("watts",), good("watts", 20, "fine"))]
    sampler = Sampler(sensors, interval=0.02, on_tick=seen.append, stale_seconds=1.0)
    sampler.start()
    try:
        wait_until(lambda: any(item.watts == 20 for item in seen))
        told = "thermal: stuck has not answered for 1 s"
        wait_until(lambda: any(note.startswith(told) for note in sampler.notes()))
        begun = time.monotonic()
        sampler.close()
        assert time.monotonic() - begun < 10
    finally:
        release.set()


def test_the_first_of_a_kind_counts() -> None:
    readings = reading("watts", 5.0, 1.0, "a", estimated=True) + reading("watts", 9.0, 2.0, "b")
    conditions = combine(readings + reading("on_battery", 1.0, 1.0, "a"), 2.0)
    assert (conditions.watts, conditions.watts_estimated, conditions.on_battery) == (5.0, True, True)
    assert conditions.temperature is None


def test_what_nobody_sees_is_one_line() -> None:
    config = ThermalConfig(temperature_limit=90, state_limit="moderate")
    reasons = ["thermal: no temperature from RAPL: it is not there", "thermal: no watts from RAPL: it is not there"]
    lines = missing_readings(config, Conditions(0.0, state=0), reasons)
    assert lines == [
        "thermal: no sensor here for temperature; these limits are off (no temperature from RAPL: it is not there)"
    ]
    assert missing_readings(config, Conditions(0.0, temperature=40.0, state=0), []) == []
    assert missing_readings(ThermalConfig(sensor="none", temperature_limit=90), Conditions(0.0), []) == []
