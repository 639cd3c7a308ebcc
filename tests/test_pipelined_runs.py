"""Runs whose blocks are split over nodes: as users start them, resumed elsewhere, killed, joined, refused."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from harness.families import build
from harness.hot_nodes import hot_nodes
from harness.runs import (
    adapter,
    adapter_digests,
    assert_adapters_close,
    events,
    losses,
    on_hosts,
    ranks,
    same_bits,
    start,
    train,
    train_to_end,
    wait_for_events,
    wait_for_step,
)

ONE_NODE = ["topology.placement=replicate", "training.recompute=blocks"]
STAGE = re.compile(r"rank (\d): blocks (\d)-(\d)")
SCORED = ["dataset.metric=perplexity", "training.metric_rows=6", "report.samples=2", "training.metric_max_tokens=4"]
PIPELINE = ["topology=local", "topology.placement=pipeline"]
# Rank 1's Mac is hot from the start and stays so.
HOT = hot_nodes([1])


@pytest.fixture(scope="module")
def basics(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a short run of a model of six blocks."""
    model = build("llama", tmp_path_factory.mktemp("six"), num_hidden_layers=6, tie_word_embeddings=True)
    rows = [{"text": f"number {n} is followed by number {n + 1}" * (1 + n % 3)} for n in range(40)]
    data = tmp_path_factory.mktemp("rows")
    for split in ("train", "valid"):
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [
        f"model={model}",
        f"dataset={data}",
        "training.batch_size=8",
        "training.micro_batch_size=2",
        "training.steps=8",
        "training.eval_every=4",
        "training.eval_rows=12",
        "training.save_every=4",
        "training.keep_last=20",
        "training.export=last",
        "optimizer.learning_rate=1e-3",
        "optimizer.warmup_steps=2",
        "adapter.dropout=0.1",
        "report.console=false",
        "report.samples=0",
        "training.kernels=mlx",
    ]


@pytest.fixture(scope="module")
def one_node(tmp_path_factory: pytest.TempPathFactory, basics: list[str]) -> Path:
    """The run on one node, with all weights in memory and blocks recomputed."""
    return train_to_end(*basics, *ONE_NODE, *SCORED, folder=tmp_path_factory.mktemp("one-node"))


@pytest.mark.slow
def test_three_stages_have_the_bits_of_one_node(tmp_path: Path, basics: list[str], one_node: Path) -> None:
    more = ["topology.nodes=3", "topology.stages=[1,3,2]", "collective.encryption=on"]
    run = train_to_end(*basics, *PIPELINE, *more, *SCORED, folder=tmp_path)
    assert losses(run) == losses(one_node)
    scored, expected = ([event["value"] for event in events(each, "metric_scored")] for each in (run, one_node))
    assert len(scored) == 2
    np.testing.assert_allclose(scored, expected, rtol=1e-5)
    [shown], [reference] = (events(each, "samples_shown") for each in (run, one_node))
    assert shown["samples"] == reference["samples"]
    assert same_bits(adapter(run), adapter(one_node))
    assert len(set(adapter_digests(run))) == 1
    evaluated = [[event["loss"] for event in events(each, "evaluated")] for each in (run, one_node)]
    np.testing.assert_allclose(*evaluated, rtol=1e-6)
    (begun,) = events(run, "run_started")
    assert begun["layout"] == "pipeline: rank 0: blocks 0-0 > rank 1: blocks 1-3 > rank 2: blocks 4-5"
    for event in events(run, "step_done"):
        assert event["parts"]["wait"] >= 0
        assert event["parts"]["wire"] > 0
        assert event["parts"]["disk"] >= 0


@pytest.mark.slow
def test_resumed_with_other_nodes_and_another_placement(tmp_path: Path, basics: list[str], one_node: Path) -> None:
    """From the checkpoint in the middle, a pipeline goes on as one node, and one node as two pipelines of two."""
    run = train_to_end(*basics, *PIPELINE, "topology.nodes=2", folder=tmp_path / "run")
    shutil.copytree(one_node, tmp_path / "again")
    for folder in (run, tmp_path / "again"):
        shutil.rmtree(folder / "checkpoints" / "step-00000008")
        shutil.rmtree(folder / "adapters")
    alone = train(f"+resume={run}", "topology=single", *ONE_NODE, cwd=tmp_path)
    assert alone.status == 0, alone.errors
    assert same_bits(adapter(run), adapter(one_node))
    four = [*PIPELINE, "topology.nodes=4", "topology.pipelines=2"]
    again = train(f"+resume={tmp_path / 'again'}", *four, cwd=tmp_path)
    assert again.status == 0, again.errors
    assert_adapters_close(tmp_path / "again", one_node, rtol=1e-2, atol=2e-4)


@pytest.mark.slow
def test_a_hot_stage_hands_over_blocks(tmp_path: Path, basics: list[str], one_node: Path) -> None:
    run = train_to_end(*basics, *PIPELINE, *HOT, "topology.nodes=2", folder=tmp_path)
    assert losses(run) == losses(one_node)
    assert same_bits(adapter(run), adapter(one_node))
    (moved,) = events(run, "blocks_moved")
    assert moved["before"] == [3, 3]
    assert moved["blocks"][1] < 3
    assert moved["gain"] >= 0.1
    counts = [event["blocks"] for event in events(run, "step_done")]
    assert counts == [[3, 3]] * moved["step"] + [moved["blocks"]] * (8 - moved["step"])
    (line,) = json.loads((run / "summary.json").read_text())["moved_blocks"]
    assert line.startswith(f"after step {moved['step']}: rank 1 hands over {3 - moved['blocks'][1]} block")


@pytest.fixture
def slow_disk(tmp_path: Path) -> dict[str, str]:
    """Variables with which macft takes the disk for one of 100 KB a second, and streams nothing that it can avoid."""
    (tmp_path / "cache" / "macft").mkdir(parents=True)
    (tmp_path / "cache" / "macft" / "disk-speed.json").write_text(json.dumps({"bytes_per_second": 1e5}))
    return {"XDG_CACHE_HOME": str(tmp_path / "cache")}


def wide_model(folder: Path) -> Path:
    """Of six blocks of 3 MB each."""
    sizes = {"num_hidden_layers": 6, "hidden_size": 256, "intermediate_size": 1024}
    return build("llama", folder, tie_word_embeddings=True, **sizes)


@pytest.mark.slow
def test_nodes_are_killed_one_after_the_other(tmp_path: Path, basics: list[str], one_node: Path) -> None:
    """In a validation, in a backward pass, and while blocks are handed over; the last one computes all of them."""
    faults = "validation:2:kill,micro_batch:0:kill,hand_over:3:kill"
    more = [*PIPELINE, *HOT, "topology.nodes=4", f"hydra.run.dir={tmp_path}"]
    process = start(*basics, *more, cwd=tmp_path, variables={"MACFT_FAULT": faults})
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    changes = events(tmp_path, "nodes_changed")
    assert [(list(event["left"]), event["step"]) for event in changes[:2]] == [(["local-2"], 0), (["local-0"], 0)]
    assert [len(STAGE.findall(event["layout"])) for event in changes] == [3, 2, 0]
    assert changes[1]["recomputed"] is True
    assert losses(tmp_path) == losses(one_node)  # however many stages there are
    assert same_bits(adapter(tmp_path), adapter(one_node))


@pytest.mark.slow
def test_a_node_that_cannot_hold_the_run_alone_waits_for_another_one(tmp_path: Path, basics: list[str]) -> None:
    """A stage of it fits, with blocks read from disk. The first newcomer is killed while the nodes come together."""
    more = [*basics, f"model={wide_model(tmp_path / 'model')}", "adapter.rank=1", "training.batch_size=32"]
    more += ["training.steps=4", "training.eval_every=0", "training.save_every=2", "topology.placement=pipeline"]
    folder = tmp_path / "run"
    small = ["topology=local", "topology.nodes=2", "topology.memory_budget=21MB", f"hydra.run.dir={folder}"]
    process = start(*more, *small, cwd=tmp_path, variables={"MACFT_FAULT": "checkpoint:1:kill"})
    paused = "paused: the nodes that are left can't hold the run. local-0: with its blocks read from disk the run"
    wait_for_events(process, folder, "noted", 1, paused)
    assert (folder / "checkpoints" / "step-00000002").exists()
    join = [*more, "topology.memory_budget=4GB", f"topology.join={folder}"]
    first = start(
        *join, f"hydra.run.dir={tmp_path / 'guest'}", cwd=tmp_path, variables={"MACFT_FAULT": "regroup:-1:kill"}
    )
    wait_for_events(process, folder, "noted", 2, paused)
    assert first.wait(60) == -signal.SIGKILL
    first.communicate()
    second = start(*join, f"hydra.run.dir={tmp_path / 'second'}", cwd=tmp_path)
    for each in (process, second):
        _, errors = each.communicate(timeout=240)
        assert each.returncode == 0, errors
    (change,) = [event for event in events(folder, "nodes_changed") if event["joined"] and event["step"] == 2][-1:]
    small, large = (int(end) - int(start) for _, start, end in sorted(STAGE.findall(change["layout"])))
    assert small < large  # the newcomer has more memory
    whole = train_to_end(*more, *ONE_NODE, folder=tmp_path / "whole")
    assert losses(folder) == losses(whole)
    assert same_bits(adapter(folder), adapter(whole))


@pytest.mark.slow
def test_a_stage_is_killed_and_comes_back(tmp_path: Path, basics: list[str], slow_disk: dict[str, str]) -> None:
    """Under topology.placement=auto: the process that is started anew takes over what the run chose."""
    more = [*basics, "training.steps=5000", "training.eval_every=0", "training.save_every=0", "adapter.rank=1"]
    more += [f"model={wide_model(tmp_path / 'model')}", "topology=local", "topology.memory_budget=24MB"]
    local = ["topology.nodes=2", "topology.restart=true", f"hydra.run.dir={tmp_path}"]
    process = start(*more, *local, cwd=tmp_path, variables=slow_disk)
    wait_for_step(process, tmp_path, 5)
    ranks(process)[1].kill()
    wait_for_events(process, tmp_path, "nodes_changed", 2)
    wait_for_step(process, tmp_path, len(losses(tmp_path)) + 3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130, errors
    left, joined = [event["layout"] for event in events(tmp_path, "nodes_changed")][:2]
    assert left == ""
    assert len(STAGE.findall(joined)) == 2
    (ended,) = events(tmp_path, "run_ended")
    assert ended["reason"] == "interrupted"
    assert len(set(adapter_digests(tmp_path))) == 1


@pytest.mark.slow
def test_a_host_with_little_memory_gets_fewer_blocks(
    tmp_path: Path, basics: list[str], slow_disk: dict[str, str]
) -> None:
    """And makes the run a pipeline. The result has the bits of one node, as with every cut."""
    more = [*basics, f"model={wide_model(tmp_path / 'model')}", "training.steps=4", "adapter.rank=1"]
    first, second = on_hosts(tmp_path)
    budgets = (first, "topology.memory_budget=24MB"), (second, "topology.memory_budget=4GB")
    processes = [start(*more, *own, budget, cwd=tmp_path, variables=slow_disk) for own, budget in budgets]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    (begun,) = events(tmp_path / "0", "run_started")
    sizes = {int(rank): int(end) - int(start) + 1 for rank, start, end in STAGE.findall(begun["layout"])}
    assert sizes[0] < sizes[1] == 6 - sizes[0]
    (line,) = (note for note in begun["notes"] if note.startswith("topology.placement=auto chose pipeline: "))
    assert "; the whole model doesn't fit the memory of rank 0 (" in line
    whole = train_to_end(*more, *ONE_NODE, folder=tmp_path / "whole")
    assert losses(tmp_path / "0") == losses(whole)
    assert same_bits(adapter(tmp_path / "0"), adapter(whole))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["topology.stages=[1,4]"], "topology.stages: rank 0: [1, 4] are 5 blocks, and the model has 6"),
        (["topology.memory_budget=1MB"], "topology.memory_budget: rank 0: even with its blocks read from disk"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path: Path, basics: list[str], words: list[str], message: str) -> None:
    done = train(*basics, *PIPELINE, "topology.nodes=2", *words, cwd=tmp_path)
    assert done.status == 2
    assert done.errors.startswith(f"error: {message}")
    assert len(done.errors.splitlines()) == 1, done.errors


@pytest.mark.slow
def test_a_model_that_cannot_be_cut_is_one_line(tmp_path: Path, basics: list[str]) -> None:
    model = build("gemma4_text", tmp_path / "uncut")
    done = train(*basics, f"model={model}", *PIPELINE, "topology.nodes=2", cwd=tmp_path)
    assert done.status == 2
    assert done.errors.startswith("error: topology.placement: pipeline can't cut this model into its blocks")
    assert len(done.errors.splitlines()) == 1
