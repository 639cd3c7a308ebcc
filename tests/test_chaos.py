"""One fault of each kind: no step is lost or repeated, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.faults import faults_of_each_kind, missing_requirement, train_with_faults
from harness.runs import train_to_end

pytestmark = pytest.mark.slow

STEPS = 160


def test_nothing_is_lost_doubled_or_left_behind(tmp_path: Path, tiny_task: list[str]) -> None:
    if reason := missing_requirement():
        pytest.skip(reason)
    overrides = [
        *tiny_task,
        "training.batch_size=6",
        f"training.steps={STEPS}",
        "training.eval_every=50",
        "training.save_every=25",
        "training.export=last",
        "optimizer.learning_rate=3e-4",
        "report.tensorboard=false",
        "report.console=false",
    ]
    reference = train_to_end(*overrides, folder=tmp_path / "reference")
    faults = faults_of_each_kind(4, nodes=3, every=3, seed=3)
    outcome = train_with_faults(
        tmp_path / "chaos", reference=reference, overrides=overrides, nodes=3, faults=faults, one_by_one=True
    )
    assert set(outcome.injected.values()) == {1}
    assert outcome.steps == STEPS
    assert outcome.changes >= 2
    assert outcome.differences.loss < 1e-2
    assert outcome.differences.weight < 1e-2
