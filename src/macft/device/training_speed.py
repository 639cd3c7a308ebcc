"""How fast this machine trains, as ``macft bench --training`` measured it: kept for plans, as its report."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from macft.device.durable import write_atomically
from macft.device.kept_measurements import cache_folder, read_kept

_NAME = "training-speed.json"
_LONGEST_RECORD = 1 << 18
# What has to be the same, so that figures of an earlier report still hold.
_SAME = ("format", "chip", "device", "memory_gb")


@dataclass(frozen=True)
class TrainingSpeed:
    """A case that was trained: ``work`` is parameters times tokens of a step, ``speed`` operations a second."""

    case: str
    work: float
    bits: int | None
    speed: float


def nearest(device: str, work: float, bits: int | None, folder: Path | None = None) -> TrainingSpeed | None:
    """The case measured on ``device`` ("cpu", "metal", "cuda") whose step is most like one of so much work.

    Quantised models are compared with quantised ones where there are any, and others with others.
    """
    found = [speed for speed in stored(folder, device=device) if (speed.bits is None) == (bits is None)]
    found = found or stored(folder, device=device)
    return min(found, key=lambda speed: abs(math.log(speed.work / work)), default=None)


def stored(folder: Path | None = None, *, device: str) -> list[TrainingSpeed]:
    """All cases measured on ``device`` that are kept."""
    report = _read(folder)
    return list(_speeds(report)) if report.get("device") == device else []


def keep(report: Mapping[str, Any], folder: Path | None = None) -> None:
    """Keeps ``report``, and of an earlier one of the same machine the cases that this one did not measure.

    Raises:
        OSError: the folder can't be written.
    """
    earlier = _read(folder)
    new = [case for case in report["cases"] if _has_speed(case)]
    names = {case["case"] for case in new}
    old = []
    if all(earlier.get(key) == report.get(key) for key in _SAME):
        old = [case for case in _cases(earlier) if _has_speed(case) and case.get("case") not in names]
    if not new:
        return
    folder = folder or cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / _NAME, json.dumps({**report, "cases": [*old, *new]}, indent=1) + "\n")


def _read(folder: Path | None) -> dict[str, Any]:
    return read_kept((folder or cache_folder()) / _NAME, longest=_LONGEST_RECORD)


def _cases(report: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
    cases = report.get("cases")
    return [case for case in cases if isinstance(case, dict)] if isinstance(cases, list) else []


def _has_speed(case: Mapping[str, Any]) -> bool:
    return case.get("operations_per_second") is not None


def _speeds(report: Mapping[str, Any]) -> Iterator[TrainingSpeed]:
    for case in _cases(report):
        try:
            work = float(case["parameters"]) * float(case["tokens_per_step"])
            speed = float(case["operations_per_second"])
            bits = None if case["bits"] is None else int(case["bits"])
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
        if all(math.isfinite(value) and value > 0 for value in (work, speed)):
            yield TrainingSpeed(str(case.get("case"))[:40], work, bits, speed)
