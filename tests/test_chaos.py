"""A short form of the chaos suite: one fault of each kind, and nothing is lost, doubled or left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos import of_each_kind, unleash, why_not
from running import train, uneven_dataset

pytestmark = pytest.mark.slow

STEPS = 160


def test_nothing_is_lost_doubled_or_left_behind(tmp_path: Path, tiny_model_folder: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    data = uneven_dataset(tmp_path / "data")
    overrides = [
        f"model={tiny_model_folder}",
        f"dataset={data}",
        "training.batch_size=6",
        f"training.steps={STEPS}",
        "training.eval_every=50",
        "training.save_every=25",
        "training.export=last",
        "optimizer.learning_rate=3e-4",
        "report.tensorboard=false",
        "report.console=false",
    ]
    reference = tmp_path / "reference"
    done = train(*overrides, f"hydra.run.dir={reference}", cwd=tmp_path)
    assert done.status == 0, done.errors
    faults = of_each_kind(4, nodes=3, every=3, seed=3)
    outcome = unleash(
        tmp_path / "chaos", reference=reference, overrides=overrides, nodes=3, faults=faults, one_by_one=True
    )
    assert set(outcome.injected.values()) == {1}
    assert outcome.steps == STEPS
    assert outcome.changes >= 2
    assert outcome.apart.loss < 1e-2
    assert outcome.apart.weight < 1e-2
