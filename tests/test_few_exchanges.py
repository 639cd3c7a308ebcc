"""Fewer bytes and fewer meetings: runs with codecs and with DiLoCo, on real processes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import psutil
import pytest

from harness.runs import (
    adapter,
    adapter_digests,
    events,
    losses,
    same_bits,
    start,
    train,
    train_to_end,
    wait_for_events,
)

pytestmark = pytest.mark.slow

DILOCO = ["training.sync=diloco", "training.inner_steps=5"]


@pytest.fixture(scope="module")
def basics(tiny_task: list[str]) -> list[str]:
    return [
        *tiny_task,
        "training.batch_size=6",
        "training.steps=20",
        "training.eval_every=10",
        "training.save_every=5",
        "training.export=last",
        "optimizer.learning_rate=1e-3",
        "report.console=false",
    ]


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory, basics: list[str]) -> Path:
    return train_to_end(*basics, folder=tmp_path_factory.mktemp("exact"))


def valid_loss(folder: Path, key: str = "valid_loss") -> float:
    return float(json.loads((folder / "summary.json").read_text())["results"][key])


@pytest.mark.parametrize("options", [["collective.codec=int8"], DILOCO])
def test_killed_and_resumed_is_bit_identical_and_all_ranks_are_alike(
    options: list[str], tmp_path: Path, basics: list[str], exact: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run = [*basics, *options, "topology=local"]
    done = train(*run, f"hydra.run.dir={whole}", cwd=tmp_path)
    assert done.status == 0, done.errors
    assert len(adapter_digests(whole)) == 2
    assert len(set(adapter_digests(whole))) == 1
    # Another way to about the same end: not the exact run's adapter, but most of its progress.
    assert not same_bits(adapter(whole), adapter(exact))
    before, found, expected = valid_loss(exact, "valid_loss_before"), valid_loss(whole), valid_loss(exact)
    assert found < before - 0.5 * (before - expected)

    process = start(*run, f"hydra.run.dir={broken}", cwd=tmp_path)
    wait_for_events(process, broken, "checkpoint_saved", 2)
    launcher = psutil.Process(process.pid)
    for member in [launcher, *launcher.children(recursive=True)]:
        member.kill()
    process.communicate()
    done = train(f"+resume={broken}", cwd=tmp_path)
    assert done.status == 0, done.errors
    assert same_bits(adapter(broken), adapter(whole))
    assert set(adapter_digests(broken)) == set(adapter_digests(whole))


def test_meeting_after_every_step_is_ordinary_training(tmp_path: Path, basics: list[str]) -> None:
    """With plain SGD inside and the mean outside, DiLoCo of one inner step is data-parallel training."""
    # A rate at which rounding does not grow: at 0.5 even two runs without DiLoCo, on one node and on two, soon differ.
    plain = [*basics, "training.steps=6", "training.eval_every=0", "training.save_every=0"]
    plain += ["optimizer.name=sgd", "optimizer.learning_rate=0.05", "training.max_grad_norm=0"]
    apart = ["training.sync=diloco", "training.inner_steps=1"]
    apart += ["training.outer_learning_rate=1", "training.outer_momentum=0", "topology=local"]
    for name, options in (("together", []), ("apart", apart)):
        done = train(*plain, *options, f"hydra.run.dir={tmp_path / name}", cwd=tmp_path)
        assert done.status == 0, done.errors
    expected, found = adapter(tmp_path / "together"), adapter(tmp_path / "apart")
    assert max(np.abs(value).max() for name, value in expected.items() if name.endswith("lora_b")) > 0.01
    for key, value in expected.items():
        np.testing.assert_allclose(np.array(found[key]), np.array(value), rtol=1e-4, atol=1e-5)


def test_one_node_may_use_diloco_too(tmp_path: Path, basics: list[str]) -> None:
    done = train(*basics, *DILOCO, f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path)
    assert done.status == 0, done.errors
    curve = losses(tmp_path / "run")
    assert len(curve) == 20
    assert np.mean(curve[-5:]) < np.mean(curve[:5])


def test_auto_says_what_it_chose(tmp_path: Path, basics: list[str]) -> None:
    done = train(*basics, "collective.codec=auto", "topology=local", f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path)
    assert done.status == 0, done.errors
    notes = [event["text"] for event in events(tmp_path / "run", "noted")]
    assert sum("collective.codec=auto: exchanging the gradient took" in note for note in notes) == 1
    assert len(set(adapter_digests(tmp_path / "run"))) == 1


def test_meetings_and_validations_must_fall_together(tmp_path: Path, basics: list[str]) -> None:
    done = train(*basics, "training.sync=diloco", "training.inner_steps=4", cwd=tmp_path)
    assert done.status == 2
    assert "training.eval_every: 10 must be a multiple of training.inner_steps (4)" in done.errors
