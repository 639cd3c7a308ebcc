"""Named points of a run at which a test can make a rank's process end, sleep or be asked to stop.

``MACFT_FAULT=POINT:RANK:ACTION`` (several with commas) does ``ACTION`` when the process that was started as ``RANK``
first reaches ``POINT``. Actions are names of signals to the process itself, such as ``kill``, ``stop`` or ``int``; with
``launcher-`` before it the signal goes to the process that started it. Without the variable nothing is done.
"""

from __future__ import annotations

import os
import signal

POINTS = (
    *("start", "rendezvous", "load", "first_step", "micro_batch", "reduce", "hand_over", "regroup", "validation"),
    *("checkpoint", "last_step", "export", "scoring", "farewell"),
)
"""Process started; about to meet the others; ring formed, nothing loaded; before the first step; before a stage's first
backward pass; gradients summed, losses not; about to take over other blocks; a new ring formed, no state shared;
before the first validation; before a checkpoint's state is taken; before the last step; before the adapter is written;
before the answers are scored; results written, the others not told."""
_VARIABLE = "MACFT_FAULT"


class _Faults:
    """What is to happen, by point, to the process of one rank."""

    def __init__(self) -> None:
        self.rank: int | None = None
        self.actions: dict[tuple[str, int], str] = {}
        for item in filter(None, os.environ.get(_VARIABLE, "").split(",")):
            point, rank, action = item.split(":")
            if point not in POINTS:
                raise ValueError(f"{_VARIABLE}: {point} is not one of {', '.join(POINTS)}")
            self.actions[point, int(rank)] = action

    def reach(self, point: str) -> None:
        """Does what is to happen at ``point``, once."""
        if self.rank is not None and (action := self.actions.pop((point, self.rank), None)):
            target = os.getppid() if action.startswith("launcher-") else os.getpid()
            os.kill(target, signal.Signals[f"SIG{action.removeprefix('launcher-').upper()}"])


_faults = _Faults() if _VARIABLE in os.environ else None


NEWCOMER = -1
"""The rank in the variable of a process that joins a running run."""


def begin(rank: int) -> None:
    """This process was started as ``rank``."""
    if _faults is not None:
        _faults.rank = rank
        _faults.reach("start")


def reach(point: str) -> None:
    """The run has come to ``point``, one of :data:`POINTS`."""
    if _faults is not None:
        _faults.reach(point)
