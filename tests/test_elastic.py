"""Nodes die, sleep and join in the middle of a run, and the result is that of an undisturbed one."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harness.runs import (
    assert_adapters_close,
    events,
    losses,
    ranks,
    start,
    train,
    train_to_end,
    wait_for_events,
    wait_for_step,
)
from helpers.quiet import quiet_hours_now
from macft.config.yaml import read

pytestmark = pytest.mark.slow

STEPS = 60


@pytest.fixture(scope="module")
def basics(tiny_task: list[str]) -> list[str]:
    """Overrides for a run of a tiny model that is long enough to be disturbed."""
    return [
        *tiny_task,
        "training.batch_size=8",
        "training.micro_batch_size=4",
        f"training.steps={STEPS}",
        "training.eval_every=20",
        "training.save_every=20",
        "training.export=last",
        "optimizer.learning_rate=1e-3",
        "adapter.dropout=0.1",
        "collective.timeout=4",
        "collective.heartbeat=0.5",
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, basics: list[str]) -> Path:
    """The run on one node that nothing happens to."""
    return train_to_end(*basics, folder=tmp_path_factory.mktemp("undisturbed"))


def assert_as_if_undisturbed(folder: Path, undisturbed: Path) -> dict[str, Any]:
    """Every step stands once and has the loss it has without the faults; so has the adapter. Returns the summary."""
    np.testing.assert_allclose(losses(folder), losses(undisturbed), rtol=2e-4)
    assert_adapters_close(folder, undisturbed, rtol=2e-2, atol=5e-4)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    for log in (folder / "logs").glob("rank-*.log"):
        for line in log.read_text().splitlines():
            assert "adapter sha256" not in line or line.split()[-1] == summary["adapter_sha256"]
    return summary


def finish(process: subprocess.Popen[str], nodes: list[psutil.Process]) -> None:
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert not psutil.wait_procs(nodes, timeout=60)[1]


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_killed_one_by_one_whoever_leads_down_to_one(
    tmp_path: Path, basics: list[str], undisturbed: Path, compiled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled, the last one has each step queued before it reads the one before."""
    monkeypatch.setenv("PATH", str(tmp_path))  # without g++ MLX records steps all the same, and fuses nothing
    more = ["topology=local", "topology.nodes=3", f"training.compile={compiled}"]
    process = start(*basics, *more, f"hydra.run.dir={tmp_path}", cwd=tmp_path)
    wait_for_step(process, tmp_path, 7)
    nodes = ranks(process)
    nodes[0].kill()
    wait_for_events(process, tmp_path, "nodes_changed", 1)
    wait_for_step(process, tmp_path, 27)
    nodes[1].kill()
    finish(process, list(nodes.values()))
    summary = assert_as_if_undisturbed(tmp_path, undisturbed)
    first, second = events(tmp_path, "nodes_changed")
    assert (first["left"], first["names"]) == ({"local-0": "its process ended"}, ["local-1", "local-2"])
    assert (second["left"], second["names"]) == ({"local-1": "its process ended"}, ["local-2"])
    rings = [[node["name"] for node in event["nodes"]] for event in events(tmp_path, "ring_formed")]
    assert rings == [["local-0", "local-1", "local-2"], ["local-1", "local-2"], ["local-2"]]
    assert sorted(event["step"] for event in events(tmp_path, "evaluated")) == [0, 20, 40, 60]
    assert (summary["nodes"], summary["nodes_at_the_end"], len(summary["membership_changes"])) == (3, 1, 2)
    # The last to lead tells of what another one saw, too.
    assert "2 lost, 0 joined, 1 at the end" in (tmp_path / "logs" / "rank-2.log").read_text()
    # Step by step the curves show how many took part.
    sizes = {event["step"]: len(event["nodes"]) for event in events(tmp_path, "step_done")}
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    assert {*sizes.values()} == {1, 2, 3}
    curves = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    shown = {
        tag: {e.step: e.value for e in curves.Scalars(f"system/cluster/{tag}")} for tag in ("world_size", "generation")
    }
    assert shown["world_size"] == sizes
    assert sorted(set(shown["generation"].values())) == [1, 2]  # none before the first change


def test_killed_before_the_first_step(tmp_path: Path, basics: list[str], undisturbed: Path) -> None:
    """When they are in touch with each other, and none has loaded the model."""
    local = ["topology=local", "topology.nodes=3", f"hydra.run.dir={tmp_path}"]
    process = start(*basics, *local, cwd=tmp_path, variables={"MACFT_FAULT": "load:0:kill"})
    finish(process, [])
    summary = assert_as_if_undisturbed(tmp_path, undisturbed)
    assert (summary["nodes_at_the_end"], events(tmp_path, "nodes_changed")[0]["step"]) == (2, 0)
    assert (tmp_path / "members.json").exists()
    assert (tmp_path / "config.yaml").exists()


def test_a_leader_that_sleeps_is_left_out_and_comes_back(tmp_path: Path, basics: list[str], undisturbed: Path) -> None:
    quiet = [f"thermal.quiet_hours={quiet_hours_now()}", "thermal.quiet_duty=0.3"]  # time enough to come back
    local = ["topology=local", "topology.nodes=3", f"hydra.run.dir={tmp_path}"]
    process = start(*basics, *quiet, *local, cwd=tmp_path)
    wait_for_step(process, tmp_path, 5)
    nodes = ranks(process)
    nodes[0].send_signal(signal.SIGSTOP)
    wait_for_events(process, tmp_path, "nodes_changed", 1)
    nodes[0].send_signal(signal.SIGCONT)
    wait_for_events(process, tmp_path, "nodes_changed", 2)
    finish(process, list(nodes.values()))
    assert_as_if_undisturbed(tmp_path, undisturbed)
    out, back = events(tmp_path, "nodes_changed")
    assert out["left"] == {"local-0": "silent for 4 s"}
    assert (back["joined"], back["names"]) == (["local-0"], ["local-1", "local-2", "local-0"])


def test_a_node_that_sleeps_through_the_end_does_not_wait_for_ever(
    tmp_path: Path, basics: list[str], undisturbed: Path
) -> None:
    process = start(*basics, "topology=local", "topology.nodes=3", f"hydra.run.dir={tmp_path}", cwd=tmp_path)
    wait_for_step(process, tmp_path, 30)
    nodes = ranks(process)
    nodes[0].send_signal(signal.SIGSTOP)
    wait_for_events(process, tmp_path, "run_ended", 1)
    assert not psutil.wait_procs([nodes[1], nodes[2]], timeout=60)[1]
    nodes[0].send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert "all other nodes have ended; the run has finished" in errors
    # It was the leader, and what it had to say no longer counts.
    assert assert_as_if_undisturbed(tmp_path, undisturbed)["reason"] == "finished"
    assert [event["reason"] for event in events(tmp_path, "run_ended")] == ["finished"]


def test_a_killed_node_is_started_again_and_another_one_joins(
    tmp_path: Path, basics: list[str], undisturbed: Path
) -> None:
    folder, guest = tmp_path / "run", tmp_path / "guest"
    # A run that is still going on when a new process has loaded its model.
    quiet = [f"thermal.quiet_hours={quiet_hours_now()}", "thermal.quiet_duty=0.15"]
    local = ["topology=local", "topology.restart=true", f"hydra.run.dir={folder}"]
    process = start(*basics, *quiet, *local, cwd=tmp_path)
    wait_for_step(process, folder, 3)
    newcomer = start(*basics, *quiet, f"topology.join={folder}", f"hydra.run.dir={guest}", cwd=tmp_path)
    wait_for_events(process, folder, "nodes_changed", 1)
    ranks(process)[0].kill()
    wait_for_events(process, folder, "nodes_changed", 3)
    finish(process, [])
    _, errors = newcomer.communicate(timeout=240)
    assert newcomer.returncode == 0, errors
    clock, guests_clock = (read(path / "config.yaml").dataset.template_time for path in (folder, guest))
    assert clock == guests_clock
    assert_as_if_undisturbed(folder, undisturbed)
    joined, lost, again = events(folder, "nodes_changed")
    assert (len(joined["joined"]), joined["names"][:2]) == (1, ["local-0", "local-1"])
    assert lost["left"] == {"local-0": "its process ended"}
    assert (again["joined"], len(again["names"])) == (["local-0"], 3)


def test_a_newcomer_with_another_configuration_is_told_so(tmp_path: Path, basics: list[str]) -> None:
    basics = [*basics, "training.steps=4000"]  # it is still going on when the newcomer asks
    process = start(*basics, "topology=local", f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path)
    wait_for_step(process, tmp_path / "run", 1)
    newcomer = train(*basics, "seed=5", f"topology.join={tmp_path / 'run'}", cwd=tmp_path)
    assert newcomer.status == 1
    assert "refuses this node: its settings or versions differ from the run's: seed: 5 instead of 0;" in newcomer.errors
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=240)
    assert process.returncode == 130
    nobody = train(*basics, "topology.join=127.0.0.1:9", "topology.start_timeout=1", cwd=tmp_path)
    assert nobody.status == 1
    assert "no answer from 127.0.0.1:11" in nobody.errors
    nowhere = train(*basics, "topology.join=no such folder", cwd=tmp_path)
    assert "nor the folder of an active run" in nowhere.errors
