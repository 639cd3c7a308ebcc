"""The controller: from a node's conditions to its duty, the part of the time that it may compute.

Temperature: a PI controller in velocity form, on the filtered temperature with a lead, towards 1 C below the limit::

    e = (limit - 1) - (T + LEAD * dT/dt)      d(duty) = KP * d(e) + KI * e * dt

- *Anti-windup*: duty itself is the state and is clamped to [min_duty, 1]. A node that waits for slower peers computes
  less than its duty allows, so a lower duty has no effect until it is below the actual load. Near the limit, duty is
  therefore at most SLACK above the smoothed actual load.
- *Rate limit*: duty falls by at most FALL and rises by at most RISE a second.
- *Hysteresis*: the controller is inactive, at full duty, until the temperature is within ENGAGE of the limit. A node is
  paused at PAUSE above the limit and starts again at RESUME below it.

Thermal state (a coarse level): additive increase, multiplicative decrease. Power: an integrator on the relative error.
The smallest of the three and of the budget's cap is used. The others follow it at a short distance, so that each can
take over at once (override control with tracking).

Gains: one unit of duty moves the die of the machines in simulated_mac.py by 30 to 60 C within 20 to 30 seconds.
KI = KP / 30 s cancels the die's own lag. KP and LEAD were tuned on all of them, with and without a blanket, at ambient
temperatures from 10 to 35 C, for the most tokens with an overshoot below 1 C.
"""

from __future__ import annotations

from dataclasses import dataclass

from macft.thermal.budget import Budget
from macft.thermal.readings import STATES, Conditions

KP, KI = 0.025, 0.025 / 30.0
LEAD, FILTER_SECONDS = 8.0, 2.0
FALL, RISE = 0.20, 0.02
ENGAGE, PAUSE, RESUME = 15.0, 6.0, 4.0
SLACK, NEAR, LOAD_SECONDS = 0.05, 3.0, 20.0
_STATE_SECONDS = 10.0
_STATE_CUT, _STATE_RISE = 0.8, 0.004
_WATTS_RATE = 0.05
_TRACKING = 0.1
_LONGEST_STEP = 10.0


@dataclass(frozen=True)
class Decision:
    """``duty`` is min_duty to 1. A paused node gives its rows away; if it can't, it computes them at its ``duty``."""

    duty: float = 1.0
    paused: bool = False
    reason: str = ""


class Governor:
    """Keeps one node within its budget. It reads no clock: the time is part of the conditions."""

    def __init__(self, budget: Budget):
        self._budget = budget
        self._time: float | None = None
        self._heat = _Heat(budget)
        self._state = self._watts = 1.0
        self._state_time = 0.0
        self._load = 1.0

    def update(self, conditions: Conditions, minute: int, load: float = 1.0) -> Decision:
        """The decision for ``conditions`` at ``minute`` of the local day.

        ``load`` is the part of the time since the last call, 0 to 1, that the node has computed.
        """
        budget = self._budget
        passed = 0.0 if self._time is None else min(max(conditions.time - self._time, 0.0), _LONGEST_STEP)
        self._time = conditions.time
        self._load += passed / (passed + LOAD_SECONDS) * (load - self._load)
        heat = self._heat.update(conditions.temperature, passed, self._load)
        state = self._update_state(conditions, passed)
        watts = self._update_watts(conditions, passed)
        cap = budget.cap(conditions, minute)
        limits = [(cap.duty, cap.reason), (heat, "temperature"), (state, "thermal state"), (watts, "power")]
        duty, reason = min(limits, key=lambda limit: limit[0])
        paused = self._heat.paused or cap.duty <= 0.0
        if self._heat.paused:
            reason = "temperature"
        duty = budget.min_duty if paused else max(duty, budget.min_duty)
        ceiling = min(1.0, duty + _TRACKING)
        self._heat.duty = min(self._heat.duty, ceiling)
        self._state, self._watts = min(self._state, ceiling), min(self._watts, ceiling)
        return Decision(duty, paused, reason if duty < 1.0 or paused else "")

    def _update_state(self, conditions: Conditions, passed: float) -> float:
        limit, state = self._budget.state, conditions.state
        self._state_time += passed
        if limit is None or state is None:
            self._state = 1.0
        elif state > limit:
            if self._state_time >= _STATE_SECONDS:
                self._state_time = 0.0
                # At the last level before sleeping, small steps would be too slow.
                self._state *= _STATE_CUT / 2 if state >= STATES.index("trapping") else _STATE_CUT
        else:
            self._state += _STATE_RISE * passed
        self._state = min(1.0, max(self._state, self._budget.min_duty))
        return self._state

    def _update_watts(self, conditions: Conditions, passed: float) -> float:
        limit, watts = self._budget.watts, conditions.watts
        if limit is None or watts is None:
            self._watts = 1.0
        else:
            change = _WATTS_RATE * (limit - watts) / limit * passed
            self._watts += min(max(change, -FALL * passed), RISE * passed)
        self._watts = min(1.0, max(self._watts, self._budget.min_duty))
        return self._watts


class _Heat:
    """The temperature's part of the governor."""

    def __init__(self, budget: Budget):
        self._limit, self._lowest = budget.temperature, budget.min_duty
        self._filtered: float | None = None
        self._error: float | None = None
        self.duty = 1.0
        self.paused = False

    def update(self, temperature: float | None, passed: float, load: float) -> float:
        """The duty for this temperature and load after ``passed`` seconds; 1 without a limit or a reading."""
        if self._limit is None or temperature is None:
            self._filtered = self._error = None
            self.paused, self.duty = False, 1.0
            return 1.0
        if self.paused:
            self.paused = temperature > self._limit - RESUME
        else:
            self.paused = temperature > self._limit + PAUSE
        previous = self._filtered if self._filtered is not None else temperature
        weight = passed / (passed + FILTER_SECONDS)
        self._filtered = previous + weight * (temperature - previous)
        slope = (self._filtered - previous) / passed if passed > 0 else 0.0
        error = self._limit - 1.0 - (self._filtered + LEAD * slope)
        before = error if self._error is None else self._error
        self._error = error
        if error > ENGAGE and self.duty >= 1.0:
            return 1.0
        change = KP * (error - before) + KI * error * passed
        if error < NEAR:
            self.duty = min(self.duty, load + SLACK)
        self.duty += min(max(change, -FALL * passed), RISE * passed)
        self.duty = min(1.0, max(self.duty, self._lowest))
        return self.duty
