"""Runs whose blocks are read from disk: on one node, on two as users start them, killed, resumed, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import macft
from harness.families import build
from harness.runs import (
    adapter,
    assert_adapters_close,
    events,
    losses,
    ranks,
    same_bits,
    start,
    train_to_end,
    wait_for_step,
)
from helpers.runs_here import refused, train_here

STREAM = ["topology.placement=stream", "topology.resident_blocks=0"]
RECOMPUTED = ["topology.placement=replicate", "training.recompute=blocks"]


@pytest.fixture(scope="module")
def basics(tiny_task: list[str]) -> list[str]:
    """Overrides for a short run of the tiny model."""
    return [
        *tiny_task,
        "dataset.mask_prompt=true",
        "training.batch_size=7",
        "training.micro_batch_size=4",
        "training.steps=12",
        "training.eval_every=6",
        "training.save_every=3",
        "training.keep_last=20",
        "training.export=last",
        "optimizer.learning_rate=1e-3",
        "adapter.dropout=0.1",
        "report.console=false",
        "training.kernels=mlx",
    ]


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory: pytest.TempPathFactory, basics: list[str]) -> Path:
    """The run with all weights in memory and blocks recomputed. Read only, as the next one."""
    return train_here(*basics, *RECOMPUTED, folder=tmp_path_factory.mktemp("in-memory") / "run")


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory, basics: list[str]) -> Path:
    """The run whose blocks are all read from disk."""
    return train_here(*basics, *STREAM, folder=tmp_path_factory.mktemp("streamed") / "run")


@pytest.mark.slow
def test_a_streamed_run_has_the_bits_of_one_in_memory(streamed: Path, in_memory: Path) -> None:
    assert losses(streamed) == losses(in_memory)
    assert same_bits(adapter(streamed), adapter(in_memory))
    evaluated = [[event["loss"] for event in events(run, "evaluated")] for run in (streamed, in_memory)]
    assert evaluated[0] == evaluated[1]
    (begun,) = events(streamed, "run_started")
    assert begun["layout"].startswith("stream: 0 of 2 blocks stay in memory")
    assert all(event["parts"]["disk"] >= 0 for event in events(streamed, "step_done"))
    assert "disk" not in events(in_memory, "step_done")[0]["parts"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "exchange", [["collective.codec=int8"], ["training.sync=diloco", "training.inner_steps=3"]], ids=["int8", "diloco"]
)
def test_two_nodes_exchange_the_same(tmp_path: Path, basics: list[str], exchange: list[str]) -> None:
    two = [*basics, "topology=local", "topology.nodes=2", "training.steps=6", *exchange]
    adapters = [
        adapter(train_to_end(*two, *placement, folder=tmp_path / str(number)))
        for number, placement in enumerate((STREAM, RECOMPUTED))
    ]
    assert same_bits(*adapters)


@pytest.mark.slow
def test_resumed_with_its_weights_elsewhere(tmp_path: Path, streamed: Path, in_memory: Path) -> None:
    """From a checkpoint of a run in memory, and back again."""
    for first, then in ((in_memory, STREAM), (streamed, RECOMPUTED)):
        folder = Path(shutil.copytree(first, tmp_path / first.parent.name))
        for step in (9, 12):
            shutil.rmtree(folder / "checkpoints" / f"step-{step:08d}")
        shutil.rmtree(folder / "adapters")
        macft.resume(folder, then)
        assert losses(folder) == losses(in_memory)
        assert same_bits(adapter(folder), adapter(in_memory))


@pytest.mark.slow
def test_two_nodes_stream(tmp_path: Path, basics: list[str], in_memory: Path) -> None:
    run = train_to_end(*basics, *STREAM, "topology=local", "topology.nodes=2", folder=tmp_path)
    np.testing.assert_allclose(losses(run), losses(in_memory), rtol=1e-4)
    assert_adapters_close(run, in_memory, rtol=1e-2, atol=2e-4)


@pytest.mark.slow
def test_one_of_two_that_stream_is_killed(tmp_path: Path, basics: list[str]) -> None:
    more = ["training.steps=30", "training.eval_every=0", "topology=local"]
    whole = train_to_end(*basics, *more, *STREAM, "topology.nodes=2", folder=tmp_path / "whole")
    folder = tmp_path / "killed"
    folder.mkdir()
    process = start(*basics, *more, *STREAM, "topology.nodes=2", f"hydra.run.dir={folder}", cwd=folder)
    wait_for_step(process, folder, 5)
    ranks(process)[0].kill()
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert len(losses(folder)) == 30
    np.testing.assert_allclose(losses(folder), losses(whole), rtol=2e-4)
    assert len(events(folder, "nodes_changed")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("words", [["training.kernels=mlx", "training.packing=false"], ["training.kernels=cpu"]])
def test_auto_streams_what_does_not_fit(tmp_path: Path, words: list[str]) -> None:
    """The predicted memory is that of the blocks in memory. What is used is within 15% of it, and of the budget."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 24}
    wide = build("llama", tmp_path / "wide", tie_word_embeddings=True, **sizes)
    (tmp_path / "data").mkdir()
    rows = [{"text": f"number {n} is followed by number {n + 1}"} for n in range(16)]
    for split in ("train", "valid"):
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [
        *words,
        f"model={wide}",
        f"dataset={tmp_path / 'data'}",
        "training.batch_size=4",
        "training.steps=2",
        "optimizer.warmup_steps=0",
        "topology.memory_budget=60MB",
    ]
    run = train_to_end(*words, folder=tmp_path / "run")
    (begun,) = events(run, "run_started")
    assert "blocks stay in memory, the others are read from disk" in begun["layout"]
    predicted = float(next(note for note in begun["notes"] if note.startswith("memory: about")).split()[2])
    used = json.loads((run / "summary.json").read_text())["peak_memory_bytes"]
    assert used == pytest.approx(predicted * 1e9, rel=0.15)
    assert used <= 1.15 * 60e6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["adapter=full"], "topology.placement: stream can't train the model's own weights"),
        (["training.compile=true"], "training.compile: a step with topology.placement=stream can't be compiled"),
        (["model.quantization=4bit"], "topology.placement: stream would quantise each block again"),
        (["topology.resident_blocks=-1"], "topology.resident_blocks: '-1' is neither auto nor a number"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path: Path, tiny_task: list[str], words: list[str], message: str) -> None:
    short = ["training.steps=1", "optimizer.warmup_steps=0", "topology.placement=stream"]
    error = refused(*tiny_task, *short, *words, folder=tmp_path / "run")
    assert error.exit_code == 2
    assert str(error).startswith(message)


@pytest.mark.slow
def test_a_torn_file_and_a_model_that_cannot_be_cut_are_one_line(tmp_path: Path, tiny_task: list[str]) -> None:
    folder = build("llama", tmp_path / "torn")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    words = [tiny_task[1], "training.steps=1", "optimizer.warmup_steps=0", "topology.placement=stream"]
    torn = refused(f"model={folder}", *words, folder=tmp_path / "first")
    assert torn.exit_code == 2
    assert "model.safetensors has" in str(torn)
    assert "and should have" in str(torn)
    uncut = refused(f"model={build('gemma4_text', tmp_path / 'uncut')}", *words, folder=tmp_path / "second")
    assert uncut.exit_code == 2
    assert str(uncut).startswith("topology.placement: stream can't cut this model into its blocks")
