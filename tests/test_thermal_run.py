"""Real runs with a simulated hot Mac: rows move away and come back, and nothing that is learnt changes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from harness.runs import environment, events, losses, start, train
from helpers.runs_here import train_here

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def basics(tiny_task: list[str]) -> list[str]:
    """Overrides for a run of a tiny model."""
    return [
        *tiny_task,
        "dataset.mask_prompt=true",
        "training.batch_size=8",
        "training.micro_batch_size=2",
        "training.eval_every=0",
        "training.save_every=0",
        "optimizer.learning_rate=1e-3",
        "report.console=false",
    ]


# Rank 1's Mac is hot from the start and lies on a blanket, which is taken away after 60 simulated seconds.
HOT = [
    "thermal=performance",
    "thermal.sensor=simulated",
    "thermal.interval=0.05",
    "thermal.temperature_limit=72",
    "thermal.simulated.chip=mac-mini-m2",
    "thermal.simulated.speed=40",
    "thermal.simulated.hot_ranks=[1]",
    "thermal.simulated.hot_start=76",
    "thermal.simulated.blanket_seconds=60",
]


def monitor(folder: Path) -> subprocess.CompletedProcess[str]:
    """``python -m macft.monitor FOLDER --once``."""
    command = [sys.executable, "-m", "macft.monitor", str(folder), "--once"]
    return subprocess.run(
        command, env={**environment(), "COLUMNS": "120"}, capture_output=True, text=True, timeout=180, check=False
    )


def test_a_hot_nodes_share_falls_and_recovers(tmp_path: Path, basics: list[str]) -> None:
    folder = tmp_path / "run"
    run = start(*basics, *HOT, "training.steps=1000000", "topology=local", f"hydra.run.dir={folder}", cwd=tmp_path)
    try:
        deadline, fell, recovered = time.monotonic() + 150, False, False
        while not recovered:
            assert run.poll() is None, run.stderr.read() if run.stderr else ""
            shares = [event["shares"][1] for event in events(folder, "step_done")]
            lowest = min(range(len(shares)), key=shares.__getitem__) if shares else 0
            fell = bool(shares) and shares[lowest] < 0.25
            recovered = fell and max(shares[lowest:]) > 0.35
            assert time.monotonic() < deadline, (fell, shares[-1:])
            time.sleep(0.2)
        run.send_signal(signal.SIGINT)
        assert run.wait(60) == 130
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
    steps = events(folder, "step_done")
    hot = [step["nodes"][1] for step in steps]
    assert max(node["temperature"] for node in hot) > 72
    assert {"temperature"} <= {node["reason"] for node in hot}
    assert all(abs(sum(step["shares"]) - 1) < 1e-9 for step in steps)
    assert all(node["peak_memory"] > 1e6 for node in steps[-1]["nodes"])
    (ring,) = events(folder, "ring_formed")
    assert [node["name"] for node in ring["nodes"]] == ["local-0", "local-1"]
    assert all(node["to_next"] > 1e6 and node["memory"] > 1e8 for node in ring["nodes"])
    assert 0 < ring["latency"] < 1
    notes = [event["text"] for event in events(folder, "noted")]
    assert any(note.startswith("thermal: node 1 ") and "limit 72" in note for note in notes)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["energy"]["estimated"] is True
    assert summary["energy"]["joules"] == pytest.approx(sum(summary["energy"]["joules_by_rank"]))
    assert summary["energy"]["joules"] > 0
    shown = monitor(folder)
    assert shown.returncode == 0, shown.stderr
    assert "interrupted" in shown.stdout
    assert " C " in shown.stdout
    assert "bit/s" in shown.stdout
    assert " W~" in shown.stdout


def test_a_budget_changes_nothing_that_is_learnt(tmp_path: Path, basics: list[str]) -> None:
    runs = {
        "governed": ["topology=local", *HOT],
        "by-speed": ["topology=local", "topology.shares=auto", "topology.rebalance_every=2"],
    }
    free = losses(train_here(*basics, "thermal=off", "training.steps=6", folder=tmp_path / "free"))
    for name, overrides in runs.items():
        done = train(*basics, *overrides, "training.steps=6", f"hydra.run.dir={tmp_path / name}", cwd=tmp_path)
        assert done.status == 0, done.errors
        np.testing.assert_allclose(losses(tmp_path / name), free, rtol=2e-4, err_msg=name)


def test_monitor_names_a_folder_that_is_none(tmp_path: Path) -> None:
    shown = monitor(tmp_path)
    assert shown.returncode == 2
    assert shown.stderr.startswith("error: ")
    assert "Traceback" not in shown.stderr
