"""The events of a short run. As a program: a run that reports to its standard output.

python -m helpers.report_events RUN_FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from macft.report.events import (
    CheckpointSaved,
    Evaluated,
    MetricScored,
    Noted,
    PhaseProgress,
    Reporter,
    RunEnded,
    RunStarted,
    Sample,
    SamplesShown,
    Sink,
    StepDone,
)
from macft.report.run_folder import RunFolder
from macft.report.settings import ReportConfig
from macft.report.sinks import fan_out

TOTAL = 20
PARTS = {"data": 0.01, "compute": 0.3, "all_reduce": 0.15, "update": 0.04}
FINAL = {"valid_loss_before": 3.5, "valid_loss": 1.25, "sql_execution_before": 0.125, "sql_execution": 0.75}
HPARAMS = {
    "name": "run",
    "seed": 7,
    "model": {"path": "tiny", "revision": None, "trust_remote_code": False},
    "dataset": {"path": "sql", "metric": "sql_execution"},
    "adapter": {"type": "lora", "rank": 8, "targets": ["q_proj", "v_proj"], "layers": []},
    "optimizer": {"learning_rate": 1e-4, "arguments": {"eps": 1e-8}},
    "training": {"steps": TOTAL},
    "topology": {"nodes": 2, "port": 4711},
    "report": {"every": 10},
}
SAMPLE = Sample(
    "CREATE TABLE a (x INT)\nHow many | rows?",
    "SELECT COUNT(*) FROM a WHERE x < 5",
    "\x1b[31mred\x07 [bold]herring",
    "SELECT 1",
    False,
    True,
)


def started(folder: Path, first_step: int = 0) -> RunStarted:
    return RunStarted(
        run_folder=folder,
        device="CPU",
        model="bundled-name",
        adapter="lora rank 8",
        trainable_parameters=1_000_000,
        total_parameters=20_000_000,
        train_rows=2400,
        valid_rows=120,
        test_rows=64,
        batch_size=8,
        total_steps=TOTAL,
        first_step=first_step,
        rank=0,
        world_size=2,
        shares="equal",
        config_yaml="model:\n  path: tiny\n",
        notes=["weights dequantised to float32"],
    )


def step(number: int, loss: float | None = None) -> StepDone:
    return StepDone(
        step=number,
        total_steps=TOTAL,
        epoch=number / 300,
        loss=4.0 - number / 10 if loss is None else loss,
        learning_rate=1e-4,
        grad_norm=1.5,
        target_tokens=100,
        tokens=400,
        node_tokens=200,
        seconds=0.5,
        bytes_sent=4096,
        residual_norm=0.25,
        parts=PARTS,
        peak_memory=2_000_000_000,
        active_memory=1_000_000_000,
    )


def ended(folder: Path, reason: str = "finished", steps: int = TOTAL) -> RunEnded:
    final = FINAL if reason == "finished" else {}
    return RunEnded(reason, steps, 12.5, final, folder / "adapters" if final else None, "ab" * 32)


def tell(reporter: Sink, folder: Path, *, first: int = 0, until: int = TOTAL) -> None:
    """A run's events, from its start or from where it resumes, to its end or to where it is interrupted."""
    reporter.handle(started(folder, first))
    if first == 0:
        reporter.handle(PhaseProgress("answering, before", 1, 2))
        reporter.handle(MetricScored(0, "sql_execution", "test", "before", 0.125, 64, 2.0))
        reporter.handle(Evaluated(0, 3.5, 900, 1.0, True))
    for number in range(first + 1, until + 1):
        reporter.handle(step(number))
        if number % 10 == 0:
            reporter.handle(PhaseProgress("validation", 1, 2))
            reporter.handle(Evaluated(number, 3.5 - number / 10, 900, 1.0, True))
            reporter.handle(CheckpointSaved(number, folder / f"step-{number}", True, 0.1, 0.01))
    if until == TOTAL:
        reporter.handle(Noted("the disk is nearly full", "warning"))
        reporter.handle(MetricScored(TOTAL, "sql_execution", "test", "after", 0.75, 64, 2.0))
        reporter.handle(SamplesShown(TOTAL, [SAMPLE]))
        reporter.handle(ended(folder))
    else:
        reporter.handle(ended(folder, "interrupted", until))
    reporter.close()


def build(folder: RunFolder, **settings: Any) -> Reporter:
    return fan_out.build(ReportConfig(**settings), folder, hparams=HPARAMS, is_main=True, first_step=0)


if __name__ == "__main__":
    run_folder = RunFolder(Path(sys.argv[1]))
    tell(build(run_folder, every=1, tensorboard=False), run_folder.path)
