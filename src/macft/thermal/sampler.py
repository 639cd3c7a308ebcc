"""Reads the sensors in the background, so that none of them can hold up training."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence

from macft.thermal.readings import Conditions, Reading, combine
from macft.thermal.sensors.base import Sensor, now

log = logging.getLogger("macft.thermal")
# A reading older than this many intervals is not used.
_STALE_INTERVALS = 4.0
# The longest time, in seconds, between two attempts to read a sensor that fails.
_LONGEST_BACKOFF = 300.0


class Sampler:
    """One daemon thread for each sensor and one that calls ``on_tick`` every ``interval`` seconds.

    ``sensors`` are ordered, the most trusted first. A sensor is read only while those before it do not give all its
    kinds of reading. A sensor that fails, hangs for ``stale_seconds`` or gives impossible values is reported once, and
    the next one that gives the same kind is used.
    """

    def __init__(
        self,
        sensors: Sequence[Sensor],
        *,
        interval: float,
        on_tick: Callable[[Conditions], None],
        stale_seconds: float = 10.0,
    ):
        self._interval, self._on_tick = interval, on_tick
        self._stale = max(stale_seconds, _STALE_INTERVALS * interval)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._notes: list[str] = []
        self._slots = [_Slot(sensor) for sensor in sensors]
        self._threads = [
            threading.Thread(target=self._run, args=(place,), name=f"sensor-{slot.sensor.name}", daemon=True)
            for place, slot in enumerate(self._slots)
        ]
        self._threads.append(threading.Thread(target=self._tick, name="thermal-sampler", daemon=True))

    def start(self) -> None:
        """Starts the threads."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ends the threads; does not wait for one that hangs in its sensor."""
        self._stop.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(0.5)

    def notes(self) -> list[str]:
        """New lines about sensors since the last call, each once."""
        with self._lock:
            notes, self._notes = self._notes, []
            return notes

    def has_answered(self) -> bool:
        """Whether each sensor has given a reading, has failed, or wasn't needed."""
        with self._lock:
            return all(slot.time or slot.failed for slot in self._slots)

    def conditions(self) -> Conditions:
        """The newest readings, combined."""
        with self._lock:
            readings = [item for slot in self._slots for item in self._fresh(slot)]
        return combine(readings, max((item.time for item in readings), default=now()))

    def _fresh(self, slot: _Slot) -> list[Reading]:
        return slot.readings if time.monotonic() - slot.time <= self._stale else []

    def _run(self, place: int) -> None:
        slot, wait = self._slots[place], self._interval
        try:
            while not self._stop.is_set():
                if self._is_needed(place):
                    wait = self._read(slot, wait)
                else:
                    with self._lock:
                        # A sensor that is not needed counts as answered. Its old readings must not be used later.
                        slot.time, slot.readings = time.monotonic(), []
                    wait = self._interval
                self._stop.wait(wait)
        finally:
            with contextlib.suppress(Exception):
                slot.sensor.close()

    def _read(self, slot: _Slot, wait: float) -> float:
        with self._lock:
            slot.asked = time.monotonic()
        try:
            readings = slot.sensor.read()
        except Exception as error:
            self._fail(slot, " ".join(str(error).split())[:200] or type(error).__name__)
            return min(max(2 * wait, self._interval), _LONGEST_BACKOFF)
        with self._lock:
            slot.asked = None
            slot.readings, slot.time, slot.failed = readings, time.monotonic(), False
        return self._interval

    def _is_needed(self, place: int) -> bool:
        with self._lock:
            covered = {item.kind for slot in self._slots[:place] for item in self._fresh(slot)}
        return not covered.issuperset(self._slots[place].sensor.kinds)

    def _fail(self, slot: _Slot, reason: str) -> None:
        with self._lock:
            slot.asked, slot.failed, slot.readings = None, True, []
            is_repeated = slot.reported
            if not slot.reported:
                slot.reported = True
                self._notes.append(f"thermal: no {' or '.join(slot.sensor.kinds)} from {slot.sensor.name}: {reason}")
        level = logging.DEBUG if is_repeated else logging.INFO
        log.log(level, "no %s from %s: %s", " or ".join(slot.sensor.kinds), slot.sensor.name, reason)

    def _tick(self) -> None:
        while not self._stop.wait(self._interval):
            for slot in self._slots:
                with self._lock:
                    hangs = slot.asked is not None and time.monotonic() - slot.asked > self._stale
                if hangs and not slot.reported:
                    log.warning("%s has not answered for %.0f s", slot.sensor.name, self._stale)
                    slot.failed = slot.reported = True
                    with self._lock:
                        self._notes.append(
                            f"thermal: {slot.sensor.name} has not answered for {self._stale:.0f} s; "
                            "other sources are used meanwhile"
                        )
            self._on_tick(self.conditions())


class _Slot:
    """A sensor and its newest readings; ``time`` and ``asked`` are on the monotonic clock."""

    def __init__(self, sensor: Sensor):
        self.sensor = sensor
        self.readings: list[Reading] = []
        self.time = 0.0
        self.asked: float | None = None
        self.failed = self.reported = False
