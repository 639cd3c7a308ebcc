"""``macft bench --training``: plans each case, measures those that fit, and shows and writes what came out."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from macft.cli.run_command import INTERRUPTED
from macft.device import training_speed
from macft.device.durable import write_atomically
from macft.device.mlx_device import prepare_device
from macft.errors import MacftError
from macft.model.fetch.bundled import ensure_bundled
from macft.model.load import load_tokenizer
from macft.model.settings import ModelConfig
from macft.report.durations import duration
from macft.training_bench.cases import Case, plan_case, reason_against
from macft.training_bench.report import reasons, table, to_plain
from macft.training_bench.sides import Training
from macft.training_bench.turns import CaseResult, measure

ROUNDS = 3
# Steps that are timed, and those before, by kind of rows: as trained by default, and with --quick.
_STEPS = {"sql": (20, 4), "mixed": (20, 4), "long": (5, 2)}
_QUICK_STEPS = {"sql": (6, 2), "mixed": (6, 2), "long": (2, 1)}
# A case that would take longer is left out unless it is named. mlx-lm's side is counted one and a half times.
_LONGEST_CASE = 30 * 60.0
_SIDES_AS_STEPS = 2.5


@dataclass(frozen=True)
class Wanted:
    """What the command was asked for; ``steps`` are timed in place of the usual number.

    ``kept_in``: the folder of what plans read, by default macft's in the user's cache.
    """

    cases: Sequence[Case]
    named: bool = False
    quick: bool = False
    steps: int | None = None
    out: Path | None = None
    kept_in: Path | None = None

    @property
    def rounds(self) -> int:
        """Runs of each side."""
        return 1 if self.quick else ROUNDS

    def training(self, case: Case) -> Training:
        """The steps of a case."""
        timed, warm_up = (_QUICK_STEPS if self.quick else _STEPS)[case.rows]
        return Training(case.rows, (self.steps or timed) + warm_up, warm_up)


def bench_training(wanted: Wanted) -> int:
    """Measures, prints the table, writes the files, and returns the exit status.

    After Ctrl-C it ends at once, and shows and writes what is done.
    """
    console, results, status = Console(), [], 0
    console.print(f"{prepare_device()}\nrandom weights, rows in tokens of SmolLM2", markup=False, highlight=False)
    tokenizer = load_tokenizer(ModelConfig(), ensure_bundled())
    try:
        for case in wanted.cases:
            found = CaseResult(case, wanted.training(case))
            results.append(found)
            with console.status(f"{case.name}: planning") as shown:
                try:
                    found.plan = plan_case(case, found.training, tokenizer)
                    found.why_not = _why_not(found, wanted)
                except MacftError as error:
                    found.why_not = str(error)
                if found.why_not is None:
                    measure(found, wanted.rounds, shown.update)
    except KeyboardInterrupt:
        status = INTERRUPTED
    console.print(table(results))
    for line in reasons(results):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(
        "tokens/s: targets of the timed steps; ms/step: the median step; GB: MLX's peak\n"
        "ratio: macft's figure over mlx_lm's",
        markup=False,
        highlight=False,
    )
    if status:
        console.print("interrupted: the table has what was done")
    _write(wanted, results, console)
    return status or (0 if any(found.runs["macft"] for found in results) else 1)


def _why_not(found: CaseResult, wanted: Wanted) -> str | None:
    """Why a case is left out, in one line; None if it is run."""
    assert found.plan is not None
    if reason := reason_against(found.plan):
        return reason
    seconds = found.plan.seconds * found.training.steps * wanted.rounds * _SIDES_AS_STEPS
    if seconds > _LONGEST_CASE and not wanted.named:
        return f"left out, it would take about {duration(seconds)}; --cases {found.case.name} runs it"
    return None


def _write(wanted: Wanted, results: Sequence[CaseResult], console: Console) -> None:
    report = to_plain(results, wanted.rounds)
    if wanted.out is not None:
        write_atomically(wanted.out, json.dumps(report, indent=1) + "\n")
        console.print(f"written to {wanted.out}", markup=False, highlight=False, soft_wrap=True)
    try:
        training_speed.keep(report, wanted.kept_in)
    except OSError as error:
        print(f"not kept for plans: {error.strerror or error}", file=sys.stderr)
