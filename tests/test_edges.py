"""What a run's exit status says is so, whichever rank is lost at whatever point; benchmarks/edges.py has many more."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from harness import edges
from harness.edges import Kill
from harness.runs import on_hosts, start, train, wait_for_step

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def basics(tiny_task: list[str]) -> list[str]:
    return [
        *tiny_task,
        "training.batch_size=6",
        "training.steps=3",
        "training.eval_every=0",
        "training.export=last",
        "report.tensorboard=false",
    ]


@pytest.mark.parametrize(("topology", "point"), [("local", "farewell"), ("hosts", "export")])
def test_the_results_are_kept_if_the_leader_dies_at_the_end(
    tmp_path: Path, basics: list[str], topology: str, point: str
) -> None:
    outcome = getattr(edges, topology)(tmp_path / "run", basics, 2, Kill(0, point))
    assert outcome.is_killed
    assert outcome.statuses == [0], outcome.output
    assert outcome.has_result
    assert "note: rank 0 was ended by signal 9" in outcome.output or topology == "hosts"


def test_a_rank_that_dies_before_all_have_met_ends_the_start(tmp_path: Path, basics: list[str]) -> None:
    outcome = edges.local(tmp_path / "run", basics, 2, Kill(1, "rendezvous"))
    assert (outcome.statuses, outcome.has_result) == ([1], False)
    assert "error: rank 1 was ended by signal 9 before all ranks had met" in outcome.output


def test_a_leader_that_cannot_write_leaves_it_to_another_host(tmp_path: Path, basics: list[str]) -> None:
    basics = [*basics, "training.steps=150"]  # so that there is time to spoil the folder
    processes = [start(*basics, *own, cwd=tmp_path) for own in on_hosts(tmp_path)]
    wait_for_step(processes[0], tmp_path / "0")
    (tmp_path / "0" / "adapters").write_text("in the way")
    for rank, process in enumerate(processes):
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        # The one that led has it among what it prints of the run.
        told = rf"so the results are on rank 1 \(127\.0\.0\.1:\d+\), in {re.escape(str(tmp_path / '1'))}"
        assert rank == 0 or re.search(told, errors), errors
    assert (tmp_path / "1" / "adapters" / "adapters.safetensors").is_file()
    assert json.loads((tmp_path / "1" / "summary.json").read_text())["reason"] == "finished"


@pytest.mark.parametrize("nodes", [1, 2])
def test_results_that_nobody_can_write_are_no_success(tmp_path: Path, basics: list[str], nodes: int) -> None:
    folder = tmp_path / "run"
    topology = ["topology=local", f"topology.nodes={nodes}"] if nodes > 1 else []
    process = start(*basics, "training.steps=150", *topology, f"hydra.run.dir={folder}", cwd=tmp_path)
    wait_for_step(process, folder)
    (folder / "adapters").write_text("in the way")
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 1
    assert f"the adapter can't be written to {folder / 'adapters'} (File exists); make room there" in errors
    assert json.loads((folder / "summary.json").read_text())["reason"] == "failed"
    (folder / "adapters").unlink()
    done = train(f"+resume={folder}", cwd=tmp_path)
    assert done.status == 0, done.errors
