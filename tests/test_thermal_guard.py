"""A node with a budget rests for what it owes, no more, and counts its energy."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from helpers.quiet import quiet_hours_now
from helpers.waiting import wait_until
from macft.parallel.node_status import NodeStatus
from macft.thermal.energy import EnergyMeter, summarize
from macft.thermal.load import Load, LoadMeter
from macft.thermal.notices import Notices
from macft.thermal.settings import ThermalConfig
from macft.thermal.throttle import ThermalThrottle

# Half the time, whatever the sensors say, and there are none.
HALF = ThermalConfig(sensor="none", interval=0.05, quiet_hours=quiet_hours_now(), quiet_duty=0.5)


def limited(duty: float = 0.5, stop: Callable[[], bool] = lambda: False) -> ThermalThrottle:
    """A guard whose governor has made up its mind."""
    guard = ThermalThrottle(replace(HALF, quiet_duty=duty), rank=0, stop=stop)
    wait_until(lambda: guard.status(0, 0.0).duty == duty)
    return guard


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def step(guard: ThermalThrottle, work: float) -> NodeStatus:
    """A step of two micro-batches."""
    begun = time.perf_counter()
    guard.begin_step(2)
    for _ in range(2):
        guard.before_micro_batch()
        spin(work / 2)
    guard.step_computed()
    return guard.status(10, time.perf_counter() - begun)


def test_a_stage_is_told_of_with_its_blocks() -> None:
    nodes = [NodeStatus(), NodeStatus(duty=0.5, reason="quiet hours")]
    assert Notices(HALF).lines(nodes, [0.5, 0.5], [5, 1]) == [
        "thermal: node 1 may work 50% of the time, 1 block (quiet hours)"
    ]


@pytest.mark.slow
def test_rest_is_as_long_as_work_unless_others_are_waited_for() -> None:
    guard = limited()
    try:
        begun, busy = time.perf_counter(), 0.0
        for _ in range(6):
            busy += step(guard, 0.1).busy_seconds
        # What the last step owes is still open.
        assert time.perf_counter() - begun >= 2 * busy * 4 / 6
        for _ in range(3):
            begun = time.perf_counter()
            status = step(guard, 0.1)
            rested = time.perf_counter() - begun - status.busy_seconds
            time.sleep(2 * status.busy_seconds + 0.05)  # the others are slower
        assert rested < status.busy_seconds / 2
        assert (status.reason, status.paused) == ("quiet hours", False)
        assert guard.messages([status], [1.0]) == ["thermal: this node may work 50% of the time (quiet hours)"]
        assert guard.messages([status], [1.0]) == []
        for _ in range(3):
            begun = time.perf_counter()
            guard.begin_step(1)
            guard.before_micro_batch()
            spin(0.1)
            with guard.waiting():  # a stage of a pipeline, for another one
                time.sleep(0.3)
            guard.step_computed()
            seconds = time.perf_counter() - begun
            status = guard.status(10, seconds)
        assert seconds - status.busy_seconds < status.busy_seconds / 2
    finally:
        guard.close()


def test_a_request_to_stop_ends_a_rest() -> None:
    guard = limited(0.1, stop=lambda: True)
    try:
        before = guard.status(0, 0.0)
        with guard.working():
            spin(0.5)
        begun = time.perf_counter()
        after = step(guard, 0.01)
        assert after.busy_seconds <= time.perf_counter() - begun
        assert time.perf_counter() - begun - after.busy_seconds < 3  # and not the 4.5 that are owed
        assert before.duty == 0.1
    finally:
        guard.close()


def test_load_is_kept_whatever_is_told_late() -> None:
    load = Load()
    meter, other = LoadMeter(load), LoadMeter(load)
    with load.busy():
        spin(0.05)
        part, passed = meter.read()
        assert 0 < part <= 1
        assert passed >= 0.05
    time.sleep(0.05)
    assert meter.read()[0] < part
    assert other.read()[0] < part


def test_energy_is_power_over_time_and_gaps_are_left_out() -> None:
    meter = EnergyMeter()
    for second, watts in enumerate([10.0, 20.0, 20.0, None, 40.0, 40.0]):
        meter.add(float(second), watts, estimated=second == 5)
    assert meter.joules == 15 + 20 + 40
    assert meter.seconds == 3
    assert meter.peak_watts == 40
    assert meter.estimated


def test_a_runs_energy_and_what_it_costs() -> None:
    config = ThermalConfig(power_price=0.4, currency="USD", co2_grams_per_kwh=500)
    nodes = [NodeStatus(joules=1.8e6, peak_watts=watts, metered_seconds=36_000.0) for watts in (60.0, 40.0)]
    nodes.insert(1, NodeStatus(joules=None))
    energy = summarize(nodes, config, tokens=1_000_000, target_tokens=400_000)
    assert energy is not None
    assert (energy.kwh, energy.cost, energy.co2_grams) == (1.0, 0.4, 500.0)
    assert (energy.joules_per_token, energy.average_watts, energy.peak_watts) == (3.6, 100.0, 100.0)
    assert energy.line == (
        "3,600,000 J, 3.6 J/token, 9 J/target token, 100.0 W on average, 100.0 W at most, 1 kWh, 0.4 USD, 500 g CO2, "
        "1 of 3 nodes without a reading"
    )
    assert summarize([NodeStatus()], config, tokens=1, target_tokens=1) is None


def test_each_turn_of_a_governor_is_told_once() -> None:
    notices = Notices(ThermalConfig(temperature_limit=90))
    cool = NodeStatus(temperature=60.0)

    def lines(node: NodeStatus, share: float) -> list[str]:
        return notices.lines([cool, node], [1 - share, share])

    assert lines(NodeStatus(temperature=80.0), 0.5) == []
    hot = NodeStatus(duty=0.6, reason="temperature", temperature=91.0)
    assert lines(hot, 0.4) == ["thermal: node 1 may work 60% of the time, 40% of the rows (91 C, limit 90)"]
    assert lines(hot, 0.38) == []
    paused = NodeStatus(duty=0.1, paused=True, reason="temperature", temperature=97.0)
    assert lines(paused, 0.0) == ["thermal: node 1 pauses, the others take its rows (97 C, limit 90)"]
    assert lines(paused, 0.0) == []
    assert lines(NodeStatus(temperature=70.0), 0.5) == [
        "thermal: node 1 is back at full speed, 50% of the rows (70 C, limit 90)"
    ]
