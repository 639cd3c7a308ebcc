"""The governor keeps any machine within its budget, and never stops a cluster."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from macft.thermal.budget import Budget
from macft.thermal.governor import Governor
from macft.thermal.readings import Conditions
from macft.thermal.settings import ThermalConfig, problems
from macft.thermal.simulated_mac import CHIPS, SimulatedMac

loads = st.lists(st.tuples(st.floats(0, 1), st.integers(20, 300)), min_size=1, max_size=8)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    chip=st.sampled_from(sorted(CHIPS)),
    ambient=st.floats(-5, 42),
    blanket=st.floats(1, 3),
    limit=st.floats(60, 106),
    interval=st.floats(0.5, 3),
    wishes=loads,
)
def test_any_room_and_any_load_stay_within_the_limit(
    chip: str, ambient: float, blanket: float, limit: float, interval: float, wishes: list[tuple[float, int]]
) -> None:
    mac = SimulatedMac(CHIPS[chip], ambient=ambient, blanket=blanket)
    config = ThermalConfig(temperature_limit=limit)
    governor, duty, time = Governor(Budget(config)), 1.0, 0.0
    # What even the least duty comes to in the end, without a fan.
    least = mac.chip.idle_watts + config.min_duty * (mac.chip.full_watts - mac.chip.idle_watts)
    unavoidable = ambient + least * (mac.chip.sink_resistance + mac.chip.case_resistance * blanket)
    for wish, ticks in wishes:
        for _ in range(ticks):
            load = min(wish, duty)
            mac.run(load, interval)
            time += interval
            decision = governor.update(Conditions(time=time, temperature=mac.die), 0, load)
            duty = decision.duty
            assert config.min_duty <= duty <= 1
            assert mac.die <= max(limit + 2, unavoidable)


@pytest.mark.parametrize("chip", sorted(CHIPS))
@pytest.mark.parametrize("limit", [75.0, 98.0, 104.0])
def test_an_hour_at_full_load_is_steady(chip: str, limit: float) -> None:
    mac, governor = SimulatedMac(CHIPS[chip]), Governor(Budget(ThermalConfig(temperature_limit=limit)))
    duty, seen = 1.0, []
    for second in range(3600):
        mac.run(duty, 1.0)
        seen.append(mac.die)
        duty = governor.update(Conditions(time=second, temperature=round(mac.die, 1)), 0, duty).duty
    assert max(seen) <= limit + 2
    assert max(seen[-600:]) - min(seen[-600:]) <= 1


def test_a_governed_mac_does_more_than_one_that_throttles() -> None:
    work = {}
    for limit in (None, 104.0):
        mac, duty = SimulatedMac(CHIPS["macbook-pro-13-m2"]), 1.0
        governor = Governor(Budget(ThermalConfig(temperature_limit=limit)))
        work[limit] = 0.0
        for second in range(3600):
            work[limit] += mac.run(duty, 1.0)
            duty = governor.update(Conditions(time=second, temperature=mac.die), 0, duty).duty
    assert work[104.0] >= 1.10 * (work[None] or math.inf)


@settings(max_examples=60, deadline=None)
@given(
    series=st.lists(
        st.builds(
            Conditions,
            time=st.floats(-1e6, 1e6),
            temperature=st.none() | st.floats(10, 130),
            state=st.none() | st.integers(0, 4),
            watts=st.none() | st.floats(0.05, 2000),
            battery=st.none() | st.floats(0, 100),
            on_battery=st.none() | st.booleans(),
        ),
        max_size=40,
    ),
    load=st.floats(0, 1),
    minute=st.integers(0, 1439),
)
def test_whatever_sensors_say_duty_stays_above_its_floor(series: list[Conditions], load: float, minute: int) -> None:
    config = ThermalConfig(
        temperature_limit=80,
        state_limit="nominal",
        watts_limit=30,
        battery_floor=20,
        on_battery="slow",
        quiet_hours="22:00-07:00",
        quiet_duty=0.0,
    )
    governor = Governor(Budget(config))
    for conditions in series:
        decision = governor.update(conditions, minute, load)
        assert config.min_duty <= decision.duty <= 1
        assert bool(decision.reason) == (decision.duty < 1 or decision.paused)


def drive(config: ThermalConfig, conditions: dict[str, float | int | bool], seconds: int, minute: int = 720):
    """The decision after so many seconds of the same conditions."""
    governor = Governor(Budget(config))
    for second in range(seconds + 1):
        decision = governor.update(Conditions(time=float(second), **conditions), minute)
    return decision, governor


def test_a_state_above_the_limit_is_answered_and_forgotten() -> None:
    config = ThermalConfig(state_limit="moderate")
    hot, governor = drive(config, {"state": 2}, 60)
    assert hot.reason == "thermal state"
    assert hot.duty < 0.5
    for second in range(61, 400):
        cool = governor.update(Conditions(time=float(second), state=1), 720)
    assert cool.duty == 1
    assert cool.reason == ""


def test_power_settles_at_its_limit() -> None:
    governor, duty, time = Governor(Budget(ThermalConfig(watts_limit=20))), 1.0, 0.0
    watts = 0.0
    for _ in range(600):
        watts = 4 + 36 * duty
        time += 1
        decision = governor.update(Conditions(time=time, watts=watts), 720)
        duty = decision.duty
    assert watts == pytest.approx(20, abs=0.5)
    assert decision.reason == "power"


@pytest.mark.parametrize(
    ("minute", "duty"), [(21 * 60 + 59, 1.0), (22 * 60, 0.3), (0, 0.3), (6 * 60 + 59, 0.3), (7 * 60, 1.0)]
)
def test_quiet_hours_go_over_midnight(minute: int, duty: float) -> None:
    config = ThermalConfig(quiet_hours="22:00-07:00", quiet_duty=0.3)
    assert drive(config, {}, 5, minute)[0].duty == pytest.approx(duty)


def test_a_battery_at_its_floor_pauses_until_it_is_well_above() -> None:
    budget = Budget(ThermalConfig(battery_floor=20))
    charges = [(25.0, True), (19.0, True), (23.0, True), (26.0, True), (19.0, True), (19.0, False)]
    paused = [budget.cap(Conditions(0, battery=charge, on_battery=away), 0).duty == 0 for charge, away in charges]
    assert paused == [False, True, True, False, True, False]


def test_away_from_mains_the_node_slows_or_pauses() -> None:
    slow = drive(ThermalConfig(on_battery="slow", battery_duty=0.4), {"on_battery": True}, 3)[0]
    assert (slow.duty, slow.paused, slow.reason) == (0.4, False, "on battery")
    paused = drive(ThermalConfig(on_battery="pause"), {"on_battery": True}, 3)[0]
    assert (paused.duty, paused.paused, paused.reason) == (0.1, True, "on battery")
    assert drive(ThermalConfig(on_battery="pause"), {"on_battery": False}, 3)[0].duty == 1


def test_settings_that_cannot_be_right_are_named() -> None:
    config = ThermalConfig(
        sensor="magic", temperature_limit=300, state_limit="warm", quiet_hours="25:00-7", min_duty=0, on_battery="stop"
    )
    keys = {line.split(":")[0] for line in problems(config)}
    assert keys == {
        f"thermal.{key}"
        for key in ("sensor", "temperature_limit", "state_limit", "quiet_hours", "min_duty", "on_battery")
    }
    assert problems(ThermalConfig()) == []
