"""What was measured, as a table for a person and as a file that may be shown to anyone."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import psutil
from rich import box
from rich.table import Table

from macft.device.chips import own_brand
from macft.device.kind import Device
from macft.thermal.readings import STATES
from macft.training_bench.turns import SIDES, CaseResult

# isort: split
import mlx.core as mx

FORMAT = 1
_LONGEST_NAME = 60
_FIGURES = ("target_tokens_per_second", "median_step_ms", "peak_mlx_gb")


def table(results: Sequence[CaseResult]) -> Table:
    """A row for each case; a ratio is macft's figure over mlx-lm's."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    made.add_column("case", no_wrap=True)
    for head in ("tokens/s", "mlx_lm", "ratio", "ms/step", "mlx_lm", "ratio", "GB", "mlx_lm", "ratio"):
        made.add_column(head, justify="right", no_wrap=True)
    for found in results:
        cells = []
        for figure, form in zip(_FIGURES, (",.0f", ",.0f", ".2f"), strict=True):
            values = [*(found.median(side, figure) for side in SIDES), found.ratio(figure)]
            cells += [_cell(value, each) for value, each in zip(values, (form, form, ".2f"), strict=True)]
        made.add_row(found.case.name, *cells)
    return made


def reasons(results: Sequence[CaseResult]) -> list[str]:
    """A line for each case, or side of one, that has no figures."""
    lines = []
    for found in results:
        reasons = [found.why_not] if found.why_not else list(found.failures.values())
        lines += [f"{found.case.name}: {reason}" for reason in reasons]
    return lines


def to_plain(results: Sequence[CaseResult], rounds: int) -> dict[str, Any]:
    """All figures as JSON takes them. What tells a person, a machine or a network from others is not in it.

    Only what is listed here gets in; free text, such as the message of an error, does not.
    """
    return {
        "format": FORMAT,
        "chip": _chip(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "device": Device.default().kind,
        "system": _system(),
        "python": platform.python_version(),
        "macft": version("macft"),
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "rounds": rounds,
        "cases": [_case(found) for found in results],
    }


def _case(found: CaseResult) -> dict[str, Any]:
    case, plan = found.case, found.plan
    speed = found.operations_per_second
    made: dict[str, Any] = {
        "case": case.name,
        "model": case.model,
        "rows": case.rows,
        "rows_per_step": found.training.batch_size,
        "bits": case.bits,
        "dtype": case.dtype,
        "steps_timed": found.training.steps - found.training.warm_up,
        "status": _status(found),
        "operations_per_second": None if speed is None else float(f"{speed:.4g}"),
        "thermal_state": None if found.state is None else STATES[found.state],
    }
    if plan is not None:
        execution = plan.execution
        made |= {
            "parameters": plan.shape.parameters,
            "tokens_per_step": round(plan.tokens, 1),
            "predicted_peak_gb": round(plan.peak / 1e9, 3),
            "kernels": execution.kernels,
            "packing": execution.packing,
            "recompute": execution.recompute,
        }
    for side in SIDES:
        made[side] = {name: [round(run[name], 3) for run in found.runs[side]] for name in _FIGURES}
    return made


def _status(found: CaseResult) -> str:
    if found.why_not:
        return "left out"
    if found.failures:
        return f"without {' and '.join(found.failures)}"
    return "measured" if all(found.runs.values()) else "stopped"


def _chip() -> str:
    """What computes: "Apple M2 Max", "NVIDIA H100 80GB HBM3"."""
    name = own_brand() or str(mx.device_info().get("device_name", "")) or platform.machine()
    return re.sub(r"[^\w .()+-]+", " ", name)[:_LONGEST_NAME].strip()


def _system() -> str:
    """macOS's or the kernel's version, its numbers alone: what follows them can name a machine's owner."""
    name, full = (
        ("macOS", platform.mac_ver()[0]) if platform.system() == "Darwin" else (platform.system(), platform.release())
    )
    numbers = re.match(r"\d+(\.\d+){0,2}", full)
    return f"{name} {numbers[0]}" if numbers else name


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
