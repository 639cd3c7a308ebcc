"""Keeps one node within its budget while it trains: reads, decides, rests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from macft.parallel.node_status import NodeStatus
from macft.thermal.budget import Budget
from macft.thermal.energy import EnergyMeter
from macft.thermal.governor import Decision, Governor
from macft.thermal.load import Load, LoadMeter
from macft.thermal.notices import Notices, blind_spots
from macft.thermal.readings import Conditions
from macft.thermal.sampler import Sampler
from macft.thermal.sensors.base import now
from macft.thermal.sensors.choose import choose
from macft.thermal.settings import ThermalConfig

# A step's rests are never longer together, so that peers that wait for this node don't give it up.
_LONGEST_REST = 120.0
_NAP = 0.1
# Sensors that have said nothing after this many seconds are reported as silent.
_FIRST_READINGS_SECONDS = 15.0


class ThermalThrottle:
    """A :class:`~macft.training.throttle.Throttle` with a thermal budget.

    *Rows first, rest second.* A node that computes owes rest: computing for t seconds at a duty of d adds t * (1 - d)
    to the debt, and any other time of length t, waiting for a slower peer for instance, pays off t * d of it. Only what
    is left at the start of the next step is slept off, in equal parts before its micro-batches. So a node whose share
    has shrunk, and which therefore waits for the others anyway, doesn't sleep at all.
    """

    def __init__(self, config: ThermalConfig, *, rank: int, stop: Callable[[], bool]):
        self._config, self._rank, self._stop = config, rank, stop
        self._load, self._meter = Load(), EnergyMeter()
        self._load_meter = LoadMeter(self._load)
        self._governor = Governor(Budget(config))
        self._decision, self._conditions = Decision(), Conditions(time=now())
        self._owed = self._rested = self._booked = self._rest_each = 0.0
        self._micro_batches, self._is_new_step = 0, True
        self._micro_batch_begun: float | None = None
        self._settled = time.monotonic()
        sensors, missing = choose(config, self._load, rank=rank)
        self._missing = missing
        self._sampler = Sampler(sensors, interval=config.interval, on_tick=self._tick)
        self._notices = Notices(config)
        self._has_told_blind_spots = self._is_training = False
        self._sampler.start()
        self._started = time.monotonic()

    def close(self) -> None:
        """Ends the threads. Safe to call twice."""
        self._sampler.close()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Work other than a step's heats the node too."""
        self._end_micro_batch()  # of a step that a lost node has interrupted
        self._settle(busy=0.0)
        begun = time.monotonic()
        with self._load.busy():
            yield
        self._settle(busy=time.monotonic() - begun)

    def begin_step(self, micro_batches: int) -> None:
        """Announces a step of so many micro-batches; the step before may still be computing."""
        self._micro_batches, self._is_new_step = micro_batches, True

    def before_micro_batch(self) -> None:
        """Rests for this micro-batch's part of what is owed, then counts time as computing."""
        self._end_micro_batch()
        if self._is_new_step:
            self._is_new_step = False
            if not self._is_training:  # what was scored before the first step doesn't count
                self._is_training, self._meter = True, EnergyMeter()
            self._settle(busy=0.0)
            self._rested = self._booked = 0.0
            self._rest_each = self._owed / max(self._micro_batches, 1)
        self._rest(min(self._rest_each, self._owed))
        self._micro_batch_begun = time.monotonic()
        self._load.begin()

    def step_computed(self) -> None:
        """The last micro-batch of the step is computed."""
        self._end_micro_batch()

    def _end_micro_batch(self) -> None:
        if self._micro_batch_begun is None:
            return
        self._load.end()
        busy = time.monotonic() - self._micro_batch_begun
        self._micro_batch_begun = None
        self._booked += busy
        self._settle(busy=busy)

    def status(self, tokens: int, seconds: float) -> NodeStatus:
        """Settles what this step owes and describes the node."""
        busy = max(seconds - self._rested, 0.0)
        self._settle(busy=max(busy - self._booked, 0.0))
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

    def messages(self, nodes: Sequence[NodeStatus], shares: Sequence[float]) -> list[str]:
        """What the governors of all nodes do, and why."""
        return self._notices.lines(nodes, shares)

    def own_messages(self) -> list[str]:
        """What this node's sensors have to say, once."""
        if self._has_told_blind_spots:
            return self._sampler.notes()
        waited = time.monotonic() - self._started
        if waited < self._config.interval or (waited < _FIRST_READINGS_SECONDS and not self._sampler.has_answered()):
            return []
        self._has_told_blind_spots = True
        return blind_spots(self._config, self._conditions, [*self._missing, *self._sampler.notes()])

    def _tick(self, conditions: Conditions) -> None:
        local = time.localtime()
        self._decision = self._governor.update(
            conditions, local.tm_hour * 60 + local.tm_min, self._load_meter.read()[0]
        )
        self._conditions = conditions
        # Energy goes by the real clock: it is compared with the run's real time and tokens.
        self._meter.add(now(), conditions.watts, estimated=conditions.watts_estimated)

    def _settle(self, *, busy: float) -> None:
        """Books the time since the last call, of which ``busy`` seconds were spent computing."""
        time_now = time.monotonic()
        idle = max(time_now - self._settled - busy, 0.0)
        self._settled = time_now
        duty = self._decision.duty
        self._owed = max(self._owed + busy * (1 - duty) - idle * duty, 0.0) if duty < 1.0 else 0.0

    def _rest(self, debt: float) -> None:
        """Sleeps off ``debt``, at the duty that holds now, or until somebody asks for the end."""
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
