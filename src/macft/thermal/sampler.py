"""Reads the sensors in the background, so that none of them can hold up training."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence

from macft.thermal.readings import Conditions, Reading, combine
from macft.thermal.sensors.base import Sensor, now

# A reading older than this many intervals is no longer believed.
_STALE_INTERVALS = 4.0
# A sensor that failed is asked again later and later, in case it comes back.
_LONGEST_BACKOFF = 300.0


class Sampler:
    """One daemon thread for each sensor and one that calls ``on_tick`` every ``interval`` seconds.

    Sensors stand in order of trust. One is only asked while those before it leave a kind of reading open. A sensor that
    fails, hangs for ``stale_seconds`` or talks nonsense is reported once, and the next one that gives the
    same kind takes over.
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
            threading.Thread(target=self._ask, args=(place,), name=f"sensor-{slot.sensor.name}", daemon=True)
            for place, slot in enumerate(self._slots)
        ]
        self._threads.append(threading.Thread(target=self._tick, name="thermal-sampler", daemon=True))

    def start(self) -> None:
        """Starts the threads."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Asks the threads to end and waits briefly; one that hangs in its sensor is left behind."""
        self._stop.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(0.5)

    def notes(self) -> list[str]:
        """What there is to say since the last call, each thing once."""
        with self._lock:
            notes, self._notes = self._notes, []
            return notes

    def has_answered(self) -> bool:
        """Whether each sensor has given a reading, has failed, or wasn't needed."""
        with self._lock:
            return all(slot.time or slot.failed for slot in self._slots)

    def conditions(self) -> Conditions:
        """What is known now."""
        with self._lock:
            readings = [item for slot in self._slots for item in self._fresh(slot)]
        return combine(readings, max((item.time for item in readings), default=now()))

    def _fresh(self, slot: _Slot) -> list[Reading]:
        return slot.readings if time.monotonic() - slot.time <= self._stale else []

    def _ask(self, place: int) -> None:
        slot, wait = self._slots[place], self._interval
        try:
            while not self._stop.is_set():
                if self._is_needed(place):
                    wait = self._ask_once(slot, wait)
                else:
                    with self._lock:
                        # Not needed counts as answered; its old readings must not outlive the better ones.
                        slot.time, slot.readings = time.monotonic(), []
                    wait = self._interval
                self._stop.wait(wait)
        finally:
            with contextlib.suppress(Exception):
                slot.sensor.close()

    def _ask_once(self, slot: _Slot, wait: float) -> float:
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

    def _fail(self, slot: _Slot, why: str) -> None:
        with self._lock:
            slot.asked, slot.failed, slot.readings = None, True, []
            if not slot.reported:
                slot.reported = True
                self._notes.append(f"thermal: no {' or '.join(slot.sensor.kinds)} from {slot.sensor.name}: {why}")

    def _tick(self) -> None:
        while not self._stop.wait(self._interval):
            for slot in self._slots:
                with self._lock:
                    hangs = slot.asked is not None and time.monotonic() - slot.asked > self._stale
                if hangs and not slot.reported:
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
