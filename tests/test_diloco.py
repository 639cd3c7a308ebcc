"""DiLoCo's outer step: the mean that the nodes meet in, its momentum, and what a checkpoint takes along."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from harness.runs import events, train, uneven_dataset
from helpers.rings import local_listeners, run_ranks
from macft.checkpoint.snapshot import digest
from macft.collective.ring.ring import Ring
from macft.collective.settings import CollectiveConfig
from macft.collective.solo import Solo
from macft.config.schema import TrainConfig
from macft.config.validate import problems
from macft.training.diloco import OuterOptimizer
from macft.training.gradients.reducer import GradientReducer
from macft.training.settings import TrainingConfig

SHAPE = (24, 40)


def layer(dtype: Any = mx.float32) -> nn.Module:
    """A layer with the same weights each time."""
    module = nn.Linear(SHAPE[1], SHAPE[0], bias=False)
    module.update({"weight": mx.array(np.random.default_rng(1).standard_normal(SHAPE)).astype(dtype)})
    mx.eval(module.parameters())
    return module


def walk(module: nn.Module, rank: int, turn: int) -> np.ndarray:
    """Moves the weights as a node's own steps do; returns by how much, (24, 40) float32."""
    moved = 0.01 * np.random.default_rng([7, rank, turn]).standard_normal(SHAPE).astype(np.float32)
    weight = module["weight"]
    module.update({"weight": (weight.astype(mx.float32) + mx.array(moved)).astype(weight.dtype)})
    mx.eval(module.parameters())
    return moved


@settings(max_examples=25, deadline=None)
@given(st.floats(0.125, 1.0, width=32), st.floats(0.0, 0.9375, width=32), st.integers(1, 6))
def test_the_outer_step_is_nesterovs(rate: float, momentum: float, turns: int) -> None:
    """Against Sutskever's look-ahead form, which torch.optim.SGD(nesterov=True) also computes, in float64."""
    module = layer()
    outer = OuterOptimizer(module, learning_rate=rate, momentum=momentum)
    expected = np.array(module["weight"], np.float64)
    velocity = np.zeros(SHAPE)
    for turn in range(turns):
        gradient = -walk(module, 0, turn).astype(np.float64)
        outer.target_tokens = 5
        assert outer.step(module, GradientReducer(Solo())) == 5
        velocity = momentum * velocity + gradient
        expected -= rate * (gradient + momentum * velocity)
    np.testing.assert_allclose(np.array(module["weight"]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("codec", ["none", "int8"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_nodes_meet_in_the_same_bits_whatever_they_did_before(world_size: int, codec: str) -> None:
    def work(ring: Ring) -> list[bytes]:
        with mx.stream(mx.new_stream(mx.cpu)):
            module, exchange, found = layer(), GradientReducer(ring, codec), []
            outer = OuterOptimizer(module, learning_rate=0.7, momentum=0.9)
            for turn in range(5):
                walk(module, ring.rank, turn)
                outer.target_tokens = 10 + 3 * ring.rank
                outer.step(module, exchange)
                found.append(digest(module))
        return found

    results = run_ranks(local_listeners(world_size), work)
    assert all(found == results[0] for found in results)
    assert len(set(results[0])) == 5


def test_a_node_weighs_as_many_target_tokens_as_it_has_learnt_from() -> None:
    tokens = [30, 0, 10]

    def work(ring: Ring) -> tuple[np.ndarray, int]:
        with mx.stream(mx.new_stream(mx.cpu)):
            module = layer()
            outer = OuterOptimizer(module, learning_rate=1.0, momentum=0.0)
            walk(module, ring.rank, 0)
            outer.target_tokens = tokens[ring.rank]
            total = outer.step(module, GradientReducer(ring))
            return np.array(module["weight"]), total

    start = np.array(layer()["weight"])
    expected = start + sum(count / 40 * walk(layer(), rank, 0) for rank, count in enumerate(tokens))
    for weight, total in run_ranks(local_listeners(3), work):
        assert total == 40
        np.testing.assert_allclose(weight, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_going_on_from_a_checkpoint_is_bit_identical(dtype: Any) -> None:
    """Also where the parameters are coarser than the float32 that the outer step computes in."""

    def turns(outer: OuterOptimizer, module: nn.Module, first: int, last: int) -> None:
        for turn in range(first, last):
            walk(module, 0, turn)
            outer.target_tokens = 1
            outer.step(module, exchange)

    exchange, inner = GradientReducer(Solo()), optim.AdamW(learning_rate=0.1)
    whole = layer(dtype)
    inner.init(whole.trainable_parameters())
    outer = OuterOptimizer(whole, learning_rate=0.7, momentum=0.9)
    turns(outer, whole, 0, 3)
    blobs, later = outer.capture(inner, exchange), layer(dtype)
    later.update(dict(whole.trainable_parameters()))
    turns(outer, whole, 3, 6)
    again = OuterOptimizer(later, learning_rate=0.7, momentum=0.9)
    again.restore(blobs, later, optim.AdamW(learning_rate=0.1), 0)
    turns(again, later, 3, 6)
    assert digest(later) == digest(whole)


def test_auto_has_nothing_to_measure_between_meetings() -> None:
    training = TrainingConfig(steps=20, sync="diloco")
    found = problems(TrainConfig(training=training, collective=CollectiveConfig(codec="auto")))
    assert sum(line.startswith("collective.codec: auto") for line in found) == 1
    named = problems(TrainConfig(training=training, collective=CollectiveConfig(codec="int8")))
    assert not any(line.startswith("collective.codec") for line in named)


@pytest.mark.slow
def test_two_processes_meet_with_the_thermal_room_on(tmp_path: Path, tiny_model_folder: Path) -> None:
    options = [f"model={tiny_model_folder}", f"dataset={uneven_dataset(tmp_path / 'data')}", "training.batch_size=4"]
    options += ["training.steps=7", "training.eval_every=2", "training.save_every=2", "training.inner_steps=2"]
    options += ["training.sync=diloco", "topology=local", "report.console=false", "thermal=balanced"]
    done = train(*options, f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path)
    assert done.status == 0, done.errors
    steps = events(tmp_path / "run", "step_done")
    # The last step is a meeting too.
    assert [step["step"] for step in steps if step["bytes_sent"] > 0] == [2, 4, 6, 7]
    assert all("sync" in step["parts"] for step in steps)


@pytest.mark.slow
def test_one_nodes_loss_that_is_not_finite_is_told_by_all(tmp_path: Path, tiny_model_folder: Path) -> None:
    model, data = tmp_path / "model", uneven_dataset(tmp_path / "data")
    shutil.copytree(tiny_model_folder, model)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": False}))
    weights = dict(mx.load(str(model / "model.safetensors")))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    broken = np.array(weights["model.embed_tokens.weight"])
    broken[Tokenizer.from_file(str(model / "tokenizer.json")).encode("ß").ids] = np.nan
    weights["model.embed_tokens.weight"] = mx.array(broken)
    mx.save_safetensors(str(model / "model.safetensors"), weights, metadata={"format": "mlx"})
    rows = (data / "train.jsonl").read_text().splitlines()
    rows[3] = json.dumps({"prompt": "ß", "completion": "one row, so one node meets it"})
    (data / "train.jsonl").write_text("\n".join(rows))
    options = [f"model={model}", f"dataset={data}", "training.batch_size=4", "training.steps=10"]
    options += ["training.sync=diloco", "training.inner_steps=5", "training.eval_every=5", "training.save_every=5"]
    options += ["topology=local", "report.console=false"]
    done = train(*options, f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path)
    assert done.status == 1
    assert re.search(r"error: rank [01], step \d+: the loss is nan", done.errors), done.errors
    assert "is gone" not in done.errors
    assert "Traceback" not in done.errors
