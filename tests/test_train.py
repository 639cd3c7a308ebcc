"""Whole runs: what they leave behind, how they stop, and that mlx-lm takes the result."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.fuse import main as mlx_lm_fuse
from mlx_lm.generate import main as mlx_lm_generate
from mlx_lm.utils import load as mlx_lm_load
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harness.runs import adapter, events, losses, train, train_to_end, uneven_dataset, write_jsonl
from helpers.runs_here import refused, train_here

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def basics(tiny_task: list[str]) -> list[str]:
    """Overrides for a very short run of a tiny model."""
    return [
        *tiny_task,
        "dataset.mask_prompt=true",
        "training.batch_size=4",
        "training.steps=6",
        "training.eval_every=3",
        "training.save_every=2",
        "optimizer.learning_rate=1e-3",
        "report.every=1",
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, basics: list[str]) -> Path:
    """The folder of such a run after its end. Read only: copy it to go on from it."""
    return train_to_end(*basics, folder=tmp_path_factory.mktemp("finished"))


def test_a_run_leaves_everything_in_its_folder(tmp_path: Path, basics: list[str]) -> None:
    folder = tmp_path / "run"
    more = ["dataset.metric=exact_match", "training.metric_rows=3", "training.metric_max_tokens=4", "report.samples=2"]
    done = train(*basics, *more, f"hydra.run.dir={folder}", cwd=tmp_path)
    assert done.status == 0, done.errors
    assert "step 6/6" in done.output
    assert f"try it: python -m macft.generate {folder.name}\n" in done.output
    assert "with mlx-lm: mlx_lm.generate" in done.output
    assert "\x1b[" not in done.output
    assert len(losses(folder)) == 6
    assert [event["step"] for event in events(folder, "evaluated")] == [0, 3, 6]
    assert [event["when"] for event in events(folder, "metric_scored")] == ["before", "after"]
    assert len(events(folder, "samples_shown")[0]["samples"]) == 2
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "summary.md", "adapters/adapter_config.json"):
        assert (folder / name).is_file(), name
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["reason"] == "finished"
    assert len(list((folder / "checkpoints").glob("step-*"))) <= 3
    read = EventAccumulator(str(folder)).Reload()
    scalars = set(read.Tags()["scalars"])
    assert {
        "loss/train",
        "loss/valid",
        "optim/learning_rate",
        "optim/grad_norm",
        "time/compute",
    } <= scalars
    assert [event.step for event in read.Scalars("loss/train")] == [1, 2, 3, 4, 5, 6]


def test_resuming_with_the_shown_command_repeats_nothing(tmp_path: Path, finished: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before = adapter(tmp_path)
    done = train(f"+resume={tmp_path}", cwd=tmp_path)
    assert done.status == 0, done.errors
    assert len(losses(tmp_path)) == 6
    assert all(np.array_equal(before[name], value) for name, value in adapter(tmp_path).items())
    done = train(f"+resume={tmp_path}", "training.steps=8", cwd=tmp_path)
    assert done.status == 0, done.errors
    assert len(losses(tmp_path)) == 8


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_compiled_run_learns_the_same(
    tmp_path: Path, basics: list[str], finished: Path, nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # without g++ MLX records steps all the same, and fuses nothing
    more = ["training.compile=true", "training.micro_batch_size=2"]
    more += ["topology=local", f"topology.nodes={nodes}"] if nodes > 1 else []
    done = train(*basics, *more, f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path)
    assert done.status == 0, done.errors
    assert losses(tmp_path / "run") == pytest.approx(losses(finished), rel=1e-4)
    for name, value in adapter(finished).items():
        np.testing.assert_allclose(adapter(tmp_path / "run")[name], value, atol=1e-4)


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_run_may_start_from_an_adapter(tmp_path: Path, basics: list[str], finished: Path, nodes: int) -> None:
    start = [f"adapter.init_from={finished / 'adapters'}", "training.steps=1"]
    topology = ["topology=local", f"topology.nodes={nodes}"] if nodes > 1 else []
    done = train(*basics, *start, *topology, f"hydra.run.dir={tmp_path}", cwd=tmp_path)
    assert done.status == 0, done.errors
    last, first = events(finished, "evaluated")[-1], events(tmp_path, "evaluated")[0]
    assert first["loss"] == pytest.approx(last["loss"], rel=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora", "full"])
def test_mlx_lm_loads_generates_and_fuses_what_was_trained(
    tmp_path: Path, basics: list[str], tiny_model_folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = {"lora": ["adapter.layers=[0]"], "full": ["adapter.num_layers=1"]}.get(
        kind, ["adapter.targets=[q_proj,up_proj]"]
    )
    run = train_here(*basics, f"adapter={kind}", *layers, folder=tmp_path / "run")
    adapters = run / "adapters"
    model, _ = mlx_lm_load(str(tiny_model_folder), adapter_path=str(adapters))
    loaded = dict(tree_flatten(model.parameters()))
    for name, value in adapter(run).items():
        np.testing.assert_array_equal(np.array(loaded[name]), value)
    fused = tmp_path / "fused"
    tuned = ["--model", str(tiny_model_folder), "--adapter-path", str(adapters)]
    monkeypatch.setattr(sys, "argv", ["fuse", *tuned, "--save-path", str(fused)])
    mlx_lm_fuse()
    whole, _ = mlx_lm_load(str(fused))
    tokens = mx.arange(20)[None]
    np.testing.assert_allclose(np.array(whole(tokens)), np.array(model(tokens)), rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(sys, "argv", ["generate", *tuned, "--prompt", "hi", "--max-tokens", "2"])
    mlx_lm_generate()


def test_full_fine_tuning_of_a_quantised_model_saves_the_whole_model(tmp_path: Path, bundled_model: Path) -> None:
    data = uneven_dataset(tmp_path / "data")
    more = ["training.batch_size=1", "training.steps=1", "training.eval_every=0", "adapter.num_layers=1"]
    done = train("adapter=full", f"dataset={data}", *more, f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path)
    assert done.status == 0, done.errors
    model, _ = mlx_lm_load(str(tmp_path / "run" / "model"))
    loaded = dict(tree_flatten(model.parameters()))
    for name, value in adapter(tmp_path / "run").items():
        np.testing.assert_array_equal(np.array(loaded[name]), value)
    assert bundled_model.is_dir()


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    tmp_path: Path, basics: list[str], nodes: int
) -> None:
    topology = ["topology=local", f"topology.nodes={nodes}"] if nodes > 1 else []
    explode = ["optimizer.learning_rate=1e30", "training.max_grad_norm=0", "training.save_every=1", "optimizer=sgd"]
    done = train(*basics, *topology, *explode, f"hydra.run.dir={tmp_path}", cwd=tmp_path)
    assert done.status == 1
    stopped_at = len(losses(tmp_path)) + 1
    assert f"error: step {stopped_at}: the loss is " in done.errors
    assert f"step-{stopped_at - 1:08d}" in done.errors
    assert (tmp_path / "checkpoints" / f"step-{stopped_at - 1:08d}" / "manifest.json").is_file()
    assert "Traceback" not in done.errors
    assert json.loads((tmp_path / "summary.json").read_text())["reason"] == "failed"


def test_early_stopping_exports_the_best_adapter(tmp_path: Path, basics: list[str]) -> None:
    # So high a learning rate that the validation loss rises after a while.
    more = ["training.steps=60", "training.eval_every=2", "training.patience=2", "optimizer.learning_rate=0.05"]
    run = train_here(*basics, *more, "optimizer.schedule=constant", folder=tmp_path / "run")
    assert json.loads((run / "summary.json").read_text())["reason"] == "early_stopped"
    evaluated = events(run, "evaluated")
    assert len(losses(run)) < 60
    best = min(evaluated, key=lambda event: event["loss"])
    assert [event["loss"] > best["loss"] for event in evaluated[-2:]] == [True, True]
    if best["step"]:
        kept = mx.load(str(run / "checkpoints" / f"step-{best['step']:08d}" / "adapters.safetensors"))
        for name, value in adapter(run).items():
            np.testing.assert_array_equal(np.array(kept[name]), value)


def test_gradient_checkpointing_and_micro_batches_change_no_loss(tmp_path: Path, basics: list[str]) -> None:
    found: list[list[float]] = []
    for name, more in (("plain", []), ("other", ["training.recompute=blocks", "training.micro_batch_size=1"])):
        found.append(losses(train_here(*basics, *more, "adapter.dropout=0.2", folder=tmp_path / name)))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["dataset=./missing"], "does not exist"),
        (["model=./missing"], "missing"),
        (["adapter.targets=[qq_proj]"], "no projection 'qq_proj'; it has"),
        (["adapter.layers=[7]"], "adapter.layers: [7] don't exist"),
        (["optimizer.arguments={momentumm:0.9}"], "optimizer.arguments: adamw takes no such argument"),
        (["dataset.metric=sql_exec", "training.metric_rows=1"], "did you mean 'sql_execution'"),
        (["dataset.metric=sql_execution", "training.metric_rows=1"], "`database`"),
    ],
)
def test_what_only_the_data_or_model_can_tell_is_one_line_too(
    tmp_path: Path, basics: list[str], overrides: list[str], words: str
) -> None:
    error = refused(*basics, *overrides, folder=tmp_path / "run")
    assert error.exit_code in (1, 2)
    assert words in str(error)


def test_weighted_sources_and_tools_train(tmp_path: Path, basics: list[str]) -> None:
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "add"}, {"role": "assistant", "content": "ok"}]}
    tools = [
        {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
    ]
    write_jsonl(tmp_path / "chat.jsonl", [{**chat, "tools": tools}] * 6)
    write_jsonl(tmp_path / "pairs.jsonl", [{"question": "q", "answer": "a"}] * 6)
    sources = (
        f"[{{path:'{tmp_path}/chat.jsonl',weight:2}},"
        f"{{path:'{tmp_path}/pairs.jsonl',columns:{{prompt:question,completion:answer}}}}]"
    )
    rest = [item for item in basics if not item.startswith("dataset")]
    done = train(*rest, "dataset.path=''", f"dataset.sources={sources}", "dataset.metric=null", cwd=tmp_path)
    assert done.status == 0, done.errors
    assert "no validation rows" in done.output
