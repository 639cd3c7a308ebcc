"""Keeps one node within its thermal and power budget while it trains."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from macft.parallel.node_status import NodeStatus
from macft.thermal.budget import Budget
from macft.thermal.energy import EnergyMeter
from macft.thermal.governor import Decision, Governor
from macft.thermal.load import Load, LoadMeter
from macft.thermal.notices import Notices, is_notable_change, missing_readings
from macft.thermal.readings import Conditions
from macft.thermal.sampler import Sampler
from macft.thermal.sensors.base import now
from macft.thermal.sensors.choose import choose
from macft.thermal.settings import ThermalConfig

log = logging.getLogger("macft.thermal")

# At most this many seconds of sleep in a step, so that peers that wait for this node do not time out.
_LONGEST_REST = 120.0
_NAP = 0.1
# Sensors without a reading after this many seconds are reported.
_FIRST_READINGS_SECONDS = 15.0


class ThermalThrottle:
    """A :class:`~macft.training.throttle.Throttle` with a thermal budget.

    A node that computes collects a debt of idle time: computing for t seconds at a duty of d adds t * (1 - d), and any
    other time t, such as waiting for a slower peer, pays t * d. The node sleeps only for the debt that is left at the
    start of a step, in equal parts before its micro-batches. So a node with a smaller share of the rows, which waits
    for the others anyway, does not sleep.
    """

    def __init__(self, config: ThermalConfig, *, rank: int, stop: Callable[[], bool]):
        self._config, self._rank, self._stop = config, rank, stop
        self._load, self._meter = Load(), EnergyMeter()
        self._load_meter = LoadMeter(self._load)
        self._governor = Governor(Budget(config))
        self._decision, self._conditions = Decision(), Conditions(time=now())
        self._owed = self._rested = self._waited = self._booked = self._rest_each = 0.0
        self._micro_batches, self._is_new_step = 0, True
        self._micro_batch_begun: float | None = None
        self._settled = time.monotonic()
        sensors, missing = choose(config, self._load, rank=rank)
        log.info("sensors: %s", ", ".join(sensor.name for sensor in sensors) or "none")
        for reason in missing:
            log.info("no sensor: %s", reason)
        self._logged = self._decision
        self._missing = missing
        self._sampler = Sampler(sensors, interval=config.interval, on_tick=self._tick)
        self._notices = Notices(config)
        self._has_checked_readings = self._is_training = False
        self._sampler.start()
        self._started = time.monotonic()

    def close(self) -> None:
        """Ends the threads. Safe to call twice."""
        self._sampler.close()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Counts work outside of steps, such as a validation, as load and as time spent computing."""
        self._end_micro_batch()  # of a step that a lost node has interrupted
        self._settle(busy=0.0)
        begun = time.monotonic()
        with self._load.busy():
            yield
        self._settle(busy=time.monotonic() - begun)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts a wait for another stage as idle time, which pays for the work before."""
        if self._micro_batch_begun is None:
            yield
            return
        self._end_micro_batch()
        begun = time.monotonic()
        try:
            yield
        finally:
            self._waited += time.monotonic() - begun
            self._settle(busy=0.0)
            self._begin_micro_batch()

    def begin_step(self, micro_batches: int) -> None:
        """Announces a step of this many micro-batches; the step before may still be computing."""
        self._micro_batches, self._is_new_step = micro_batches, True

    def before_micro_batch(self) -> None:
        """Sleeps for this micro-batch's part of the debt, then counts time as computing."""
        self._end_micro_batch()
        if self._is_new_step:
            self._is_new_step = False
            if not self._is_training:  # energy before the first step does not count
                self._is_training, self._meter = True, EnergyMeter()
            self._settle(busy=0.0)
            self._rested = self._waited = self._booked = 0.0
            self._rest_each = self._owed / max(self._micro_batches, 1)
        self._rest(min(self._rest_each, self._owed))
        self._begin_micro_batch()

    def step_computed(self) -> None:
        """The last micro-batch of the step is computed."""
        self._end_micro_batch()

    def _begin_micro_batch(self) -> None:
        self._micro_batch_begun = time.monotonic()
        self._load.begin()

    def _end_micro_batch(self) -> None:
        if self._micro_batch_begun is None:
            return
        self._load.end()
        busy = time.monotonic() - self._micro_batch_begun
        self._micro_batch_begun = None
        self._booked += busy
        self._settle(busy=busy)

    def status(self, tokens: int, seconds: float) -> NodeStatus:
        """The node's status after a step of ``tokens`` and ``seconds``, which it adds to the debt."""
        busy = max(seconds - self._rested, 0.0)
        self._settle(busy=max(busy - self._waited - self._booked, 0.0))
        decision, conditions, meter = self._decision, self._conditions, self._meter
        return NodeStatus(
            tokens=tokens,
            busy_seconds=busy,
            duty=decision.duty,
            paused=decision.paused,
            reason=decision.reason,
            temperature=conditions.temperature,
            state=conditions.state,
            watts=conditions.watts,
            peak_watts=meter.peak_watts if meter.seconds else None,
            joules=meter.joules if meter.seconds else None,
            metered_seconds=meter.seconds,
            estimated=meter.estimated,
        )

    def messages(
        self, nodes: Sequence[NodeStatus], shares: Sequence[float], blocks: Sequence[int] | None = None
    ) -> list[str]:
        """One line for each node whose governor has clearly changed its decision."""
        return self._notices.lines(nodes, shares, blocks)

    def own_messages(self) -> list[str]:
        """New lines about this node's sensors, each once."""
        if self._has_checked_readings:
            return self._sampler.notes()
        waited = time.monotonic() - self._started
        if waited < self._config.interval or (waited < _FIRST_READINGS_SECONDS and not self._sampler.has_answered()):
            return []
        self._has_checked_readings = True
        return missing_readings(self._config, self._conditions, [*self._missing, *self._sampler.notes()])

    def _tick(self, conditions: Conditions) -> None:
        local = time.localtime()
        load, _ = self._load_meter.read()
        self._decision = self._governor.update(conditions, local.tm_hour * 60 + local.tm_min, load)
        self._conditions = conditions
        self._log_decision(conditions, load)
        # Real time, not the sensor's: energy is compared with the run's time and tokens.
        self._meter.add(now(), conditions.watts, estimated=conditions.watts_estimated)

    def _log_decision(self, conditions: Conditions, load: float) -> None:
        """Logs each decision at level debug, and one that differs clearly from the last such one at level info."""
        decision = self._decision
        is_different = is_notable_change(self._logged.duty, self._logged.paused, decision.duty, decision.paused)
        if is_different:
            self._logged = decision
        log.log(
            logging.INFO if is_different else logging.DEBUG,
            "duty %.0f%%%s%s; load %.0f%%, %s C, state %s, %s W",
            100 * decision.duty,
            ", paused" if decision.paused else "",
            f", because of {decision.reason}" if decision.reason else "",
            100 * load,
            *("-" if value is None else f"{value:g}" for value in (conditions.temperature, conditions.state)),
            "-" if conditions.watts is None else f"{conditions.watts:.1f}",
        )

    def _settle(self, *, busy: float) -> None:
        """Updates the debt for the time since the last call, of which ``busy`` seconds were spent computing."""
        time_now = time.monotonic()
        idle = max(time_now - self._settled - busy, 0.0)
        self._settled = time_now
        duty = self._decision.duty
        self._owed = max(self._owed + busy * (1 - duty) - idle * duty, 0.0) if duty < 1.0 else 0.0

    def _rest(self, debt: float) -> None:
        """Sleeps for ``debt`` at the current duty, or until the run is asked to stop."""
        begun = time.monotonic()
        while debt > 0 and not self._stop():
            duty = self._decision.duty
            left = min(debt / max(duty, 1e-3), _LONGEST_REST - self._rested - (time.monotonic() - begun))
            if duty >= 1.0 or left <= 0:
                break
            nap = min(left, _NAP)
            time.sleep(nap)
            debt -= nap * duty
        self._rested += time.monotonic() - begun
        self._settle(busy=0.0)
