"""Runs both sides of a case by turns, each in a fresh process, and keeps what each turn showed."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from macft.thermal.sensors.base import SensorError
from macft.thermal.sensors.macos_state import ThermalPressure
from macft.training_bench.cases import Case, CasePlan
from macft.training_bench.sides import Training
from macft.training_bench.worker import RunOrder

SIDES = ("macft", "mlx_lm")
_LONGEST_REASON = 90


class RunFailed(Exception):
    """A run of a side ended without figures; one line says why."""


@dataclass
class CaseResult:
    """A case: the figures of each side's runs, why one has none, and macOS's highest thermal level meanwhile.

    ``why_not``: why the case was not run; ``failures``: by side. ``plan`` is None where not even that could be made.
    """

    case: Case
    training: Training
    plan: CasePlan | None = None
    why_not: str | None = None
    runs: dict[str, list[dict[str, float]]] = field(default_factory=lambda: {side: [] for side in SIDES})
    failures: dict[str, str] = field(default_factory=dict)
    state: int | None = None

    def median(self, side: str, figure: str) -> float | None:
        """Over the runs of a side; None if there are none."""
        values = [run[figure] for run in self.runs[side]]
        return statistics.median(values) if values else None

    def ratio(self, figure: str) -> float | None:
        """The median of macft's figure over mlx-lm's, turn by turn; None if a side has none."""
        pairs = zip(self.runs["macft"], self.runs["mlx_lm"], strict=False)
        ratios = [ours[figure] / theirs[figure] for ours, theirs in pairs]
        return statistics.median(ratios) if ratios else None

    @property
    def operations_per_second(self) -> float | None:
        """Floating-point operations that macft's step needs, over the time that it took."""
        rows = self.median("macft", "rows_per_second")
        if rows is None or self.plan is None:
            return None
        return self.plan.operations * rows / self.training.batch_size


def measure(found: CaseResult, rounds: int, progress: Callable[[str], None]) -> None:
    """Runs the sides of ``found`` by turns, A B B A, and adds what they show. A side that fails is not run again."""
    assert found.plan is not None
    if found.plan.mlx_lm_peak > found.plan.budget:
        found.failures["mlx_lm"] = f"mlx_lm would need about {found.plan.mlx_lm_peak / 1e9:.1f} GB"
    for number in range(rounds):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            if side in found.failures:
                continue
            progress(f"{found.case.name}: {side}, round {number + 1} of {rounds}")
            try:
                found.runs[side].append(run_side(_order(side, found)))
            except RunFailed as failure:
                found.failures[side] = f"{side}: {failure}"
            levels = [level for level in (found.state, thermal_level()) if level is not None]
            found.state = max(levels, default=None)


def thermal_level() -> int | None:
    """macOS's thermal pressure level now; None if it can't be had."""
    if sys.platform != "darwin":
        return None
    try:
        readings = ThermalPressure().read()
    except SensorError:
        return None
    return int(readings[0].value) if readings else None


def _order(side: str, found: CaseResult) -> RunOrder:
    plan, case, training = found.plan, found.case, found.training
    assert plan is not None
    return {
        "side": side,
        "config": {key: value for key, value in case.model_config.items() if key != "quantization"},
        "bits": case.bits,
        "dtype": case.dtype,
        "rows": training.rows,
        "steps": training.steps,
        "warm_up": training.warm_up,
        "execution": asdict(plan.execution) | {"ends": sorted(plan.execution.ends)},
        "budget": plan.budget,
        "peak": plan.peak,
    }


def run_side(
    order: RunOrder, command: Sequence[str] = (sys.executable, "-m", "macft.training_bench.worker")
) -> dict[str, float]:
    """One training in a fresh process, which is ended where this one is interrupted.

    Raises:
        RunFailed: it printed no figures.
    """
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            output, errors = process.communicate(json.dumps(order))
        except BaseException:
            process.kill()
            process.wait()  # after KeyboardInterrupt Popen itself does not
            raise
    if process.returncode:
        lines = errors.strip().splitlines() or [f"ended with status {process.returncode}"]
        raise RunFailed(lines[-1][:_LONGEST_REASON])
    figures: dict[str, float] = json.loads(output.strip().splitlines()[-1])
    return figures
