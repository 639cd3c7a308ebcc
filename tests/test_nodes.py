"""Several nodes compute what one does, and a stopped run goes on as if it had never stopped."""

from __future__ import annotations

import functools
import os
import random
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from harness.runs import (
    adapter,
    adapter_digests,
    assert_adapters_close,
    events,
    free_ports,
    losses,
    on_hosts,
    ranks,
    same_bits,
    start,
    train,
    train_to_end,
    wait_for_step,
)
from helpers.quiet import quiet_hours_now
from macft.config.yaml import read

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def basics(tiny_task: list[str]) -> list[str]:
    """Overrides for a short run of a tiny model on rows of very different lengths."""
    return [
        *tiny_task,
        "dataset.mask_prompt=true",
        "training.batch_size=7",
        "training.micro_batch_size=4",
        "training.steps=30",
        "training.eval_every=10",
        "training.save_every=5",
        "training.export=last",
        "optimizer.learning_rate=1e-3",
        "adapter.dropout=0.1",
        "report.console=false",
    ]


SCORED = ["dataset.metric=[rouge_l,perplexity]", "training.metric_max_tokens=6", "report.samples=2"]
"""Both kinds of metrics, of answers and of losses."""
WholeRun = Callable[[str, int], Path]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, basics: list[str]) -> WholeRun:
    """The folder of an uninterrupted run with these ``training.kernels`` on so many nodes; each is made once."""

    @functools.cache
    def run(kernels: str, nodes: int) -> Path:
        folder = tmp_path_factory.mktemp(f"{kernels}-{nodes}")
        return train_to_end(*basics, *SCORED, f"training.kernels={kernels}", *on(nodes), folder=folder)

    return run


def on(nodes: int) -> list[str]:
    """Overrides for a run on so many nodes of this machine."""
    return ["topology=local", f"topology.nodes={nodes}"] if nodes > 1 else []


# "auto" is what this machine chooses: on a Linux CPU its own kernels. "mlx" is what a Mac runs.
both_kernels = pytest.mark.parametrize("kernels", ["auto", "mlx"])


def assert_equal_up_to_rounding(folder: Path, reference: Path) -> None:
    np.testing.assert_allclose(losses(folder), losses(reference), rtol=1e-4)
    assert_adapters_close(folder, reference, rtol=1e-2, atol=2e-4)


@both_kernels
def test_two_nodes_equal_one(whole_run: WholeRun, kernels: str) -> None:
    one, two = whole_run(kernels, 1), whole_run(kernels, 2)
    assert len(losses(one)) == 30
    assert_equal_up_to_rounding(two, one)
    scored = [events(each, "metric_scored") for each in (one, two)]
    for each in scored:
        assert [(event["name"], event["count"]) for event in each] == [("rouge_l", 6), ("perplexity", 6)] * 2
    values = [[event["value"] for event in each] for each in scored]
    np.testing.assert_allclose(values[1], values[0], rtol=1e-2, atol=1e-2)
    assert [len(events(each, "samples_shown")[0]["samples"]) for each in (one, two)] == [2, 2]
    assert len(list((two / "logs").glob("rank-*.log"))) == 1
    assert len(set(adapter_digests(two))) == 1


def test_both_kernels_learn_the_same(whole_run: WholeRun) -> None:
    assert_equal_up_to_rounding(whole_run("mlx", 1), whole_run("auto", 1))


def test_three_nodes_share_a_batch_of_seven(tmp_path: Path, basics: list[str], whole_run: WholeRun) -> None:
    done = train(*basics, "topology=local", "topology.nodes=3", f"hydra.run.dir={tmp_path}", cwd=tmp_path)
    assert done.status == 0, done.errors
    assert_equal_up_to_rounding(tmp_path, whole_run("auto", 1))
    assert len(list((tmp_path / "logs").glob("rank-*.log"))) == 2
    assert len(set(adapter_digests(tmp_path))) == 1


def children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def kill_at_random_then_resume(folder: Path, overrides: list[str], seed: int) -> None:
    """kill -9 of the whole run, three times at random moments, then to the end."""
    moments = random.Random(seed)
    process = start(*overrides, f"hydra.run.dir={folder}", cwd=folder)
    for _ in range(3):
        before = len(events(folder, "step_done"))
        wait_for_step(process, folder, before + moments.randint(1, 6))
        family = [psutil.Process(process.pid), *children(process)]
        for member in family:
            member.kill()
        psutil.wait_procs(family, timeout=60)
        process.communicate()
        process = start(f"+resume={folder}", cwd=folder)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors


@both_kernels
@pytest.mark.parametrize("nodes", [1, 2])
def test_killed_and_resumed_is_bit_identical(
    tmp_path: Path, basics: list[str], whole_run: WholeRun, nodes: int, kernels: str
) -> None:
    kill_at_random_then_resume(tmp_path, [*basics, f"training.kernels={kernels}", *on(nodes)], seed=nodes)
    assert losses(tmp_path) == losses(whole_run(kernels, nodes))
    assert same_bits(adapter(tmp_path), adapter(whole_run(kernels, nodes)))


@pytest.mark.parametrize("nodes", [1, 2])
def test_ctrl_c_saves_and_a_resume_on_other_nodes_goes_on(
    tmp_path: Path, basics: list[str], whole_run: WholeRun, nodes: int
) -> None:
    # Rests make the steps that are left last for seconds.
    quiet = [f"thermal.quiet_hours={quiet_hours_now()}", "thermal.quiet_duty=0.15"]
    process = start(*basics, *quiet, *on(nodes), f"hydra.run.dir={tmp_path}", cwd=tmp_path)
    wait_for_step(process, tmp_path, 7)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130, errors
    stopped_at = len(losses(tmp_path))
    assert 7 <= stopped_at < 30
    assert (tmp_path / "checkpoints" / f"step-{stopped_at:08d}").is_dir()
    other = ["topology=single", "topology.nodes=1"] if nodes > 1 else ["topology=local", "topology.nodes=2"]
    done = train(f"+resume={tmp_path}", *other, "thermal.quiet_hours=null", cwd=tmp_path)
    assert done.status == 0, done.errors
    assert_equal_up_to_rounding(tmp_path, whole_run("auto", 1))


def test_a_rank_that_dies_is_named_and_nothing_is_left_behind(tmp_path: Path, basics: list[str]) -> None:
    stiff = ["topology=local", "topology.nodes=3", "topology.elastic=false"]
    process = start(*basics, *stiff, f"hydra.run.dir={tmp_path}", cwd=tmp_path)
    wait_for_step(process, tmp_path, 3)
    nodes = ranks(process)
    nodes[2].kill()
    _, errors = process.communicate(timeout=240)
    assert process.returncode not in (0, None)
    assert "rank 2" in errors
    assert not psutil.wait_procs(list(nodes.values()), timeout=60)[1]


def test_ranks_stop_when_their_launcher_is_killed(tmp_path: Path, basics: list[str]) -> None:
    process = start(*basics, "topology=local", f"hydra.run.dir={tmp_path}", cwd=tmp_path)
    wait_for_step(process, tmp_path, 2)
    nodes = children(process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=240)
    _, alive = psutil.wait_procs(nodes, timeout=60)
    assert not alive
    # They stopped in order: the newest checkpoint is that of the last step reported.
    assert (tmp_path / "checkpoints" / f"step-{len(losses(tmp_path)):08d}").is_dir()


def test_hosts_typed_by_hand_on_each_machine(tmp_path: Path, basics: list[str], whole_run: WholeRun) -> None:
    ports = free_ports(4)  # of two machines with two cables between them
    first, second = (f"127.0.0.1:{one}+127.0.0.1:{other}" for one, other in (ports[:2], ports[2:]))
    processes = [
        start(
            *basics,
            "topology=hosts",
            f"topology.hosts=[{first},{second}]",
            f"topology.rank={rank}",
            f"dataset.template_time=200{rank}-01-01T00:00:00",
            f"hydra.run.dir={tmp_path / str(rank)}",
            cwd=tmp_path,
        )
        for rank in (1, 0)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    for rank in (0, 1):  # rank 0's clock is the run's
        assert read(tmp_path / str(rank) / "config.yaml").dataset.template_time == "2000-01-01T00:00:00"
    assert_equal_up_to_rounding(tmp_path / "0", whole_run("auto", 1))
    assert not (tmp_path / "1" / "adapters").exists()


def test_hosts_with_different_settings_refuse_each_other(tmp_path: Path, basics: list[str]) -> None:
    processes = [start(*basics, *own, f"seed={rank}", cwd=tmp_path) for rank, own in enumerate(on_hosts(tmp_path))]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 1
        assert "has other settings or versions than the others: seed: 1 instead of 0; make them" in errors
        assert "Traceback" not in errors


def test_a_host_that_never_comes_is_named(tmp_path: Path, basics: list[str]) -> None:
    done = train(*basics, *on_hosts(tmp_path)[0], "topology.start_timeout=3", cwd=tmp_path)
    assert done.status == 1
    assert re.search(r"rank 1 \(127\.0\.0\.1:\d+\) did not arrive", done.errors), done.errors
    assert len([line for line in done.errors.splitlines() if line.startswith("error:")]) == 1
