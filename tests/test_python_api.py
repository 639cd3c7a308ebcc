"""``import macft``: what notebooks and other programs use, and what the commands call."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import macft
from harness.runs import environment
from helpers.docs import ROOT, blocks
from helpers.report_events import ended, started, step, tell
from macft.config.paths import config_folder
from macft.config.schema import TrainConfig
from macft.errors import ConfigError, DataError, TrainingError
from macft.parallel.node_status import NodeStatus
from macft.report.energy import Energy
from macft.report.events import Event, RunEnded, StepDone
from macft.report.recorded import EventReader, events_in
from macft.report.sinks.metrics_file import MetricsFile


@pytest.fixture(scope="module")
def basics(tiny_task: list[str]) -> list[str]:
    """Overrides for a short run of the tiny model."""
    return [
        *tiny_task,
        "training.batch_size=4",
        "training.steps=6",
        "training.eval_every=3",
        "training.save_every=2",
        "report.console=false",
        "thermal=off",
    ]


@pytest.fixture(scope="module")
def finished(basics: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[macft_run, list[Event]]:
    """A run, and the events that a callback got."""
    got: list[Event] = []
    folder = tmp_path_factory.mktemp("api") / "run"
    return macft.fit(macft.compose(overrides=basics), folder=folder, callbacks=[got.append]), got


macft_run = Any
"""macft.api.training_run.TrainingRun; its import would load what `import macft` must not."""


# The package


def test_importing_macft_loads_nothing_that_takes_long() -> None:
    script = (
        "import sys, macft; print({'mlx', 'numpy', 'hydra', 'omegaconf', 'rich', 'zmq', 'transformers'} "
        "& set(sys.modules)); print(sorted(set(macft.__all__) - set(dir(macft))))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout.splitlines() == ["set()", "[]"]


def test_every_public_name_is_there_and_none_is_that_of_a_module() -> None:
    package = Path(macft.__file__).parent
    for name in macft.__all__:
        assert getattr(macft, name).__doc__
        assert not (package / f"{name}.py").exists()
        assert not (package / name).is_dir()
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = macft.trian  # type: ignore[attr-defined]


# Configurations


def test_a_recipe_and_overrides_make_a_typed_configuration() -> None:
    config = macft.compose("smoke", ["training.steps=7", "adapter.targets=[q_proj, v_proj]", "name=a b"])
    assert isinstance(config, TrainConfig)
    assert (config.training.steps, config.adapter.targets, config.name) == (7, ["q_proj", "v_proj"], "a b")
    assert not GlobalHydra.instance().is_initialized()


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("smok", [], "recipe: no option 'smok'; did you mean recipe=smoke?"),
        (None, ["training.stepz=3"], "training.stepz: no such key; did you mean training.steps?"),
        (None, ["training.steps=-3"], "training.steps:"),
        (None, ["adapter.rank=4,8"], "adapter.rank"),
        (None, ["--cfg=job"], "--cfg=job: give overrides"),
        (None, ["-m"], "-m: give overrides"),
        (None, ["hydra.run.dir=x"], "the folder is an argument of macft.fit"),
    ],
)
def test_a_wrong_override_is_one_line(recipe: str | None, overrides: list[str], message: str) -> None:
    with pytest.raises(macft.MacftError) as told:
        macft.compose(recipe, overrides)
    assert message in str(told.value)


def test_a_program_that_uses_hydra_itself_goes_on_with_its_own() -> None:
    with initialize_config_dir(str(config_folder()), version_base="1.3", job_name="program"):
        program = GlobalHydra.instance().hydra
        macft.compose("smoke")
        assert GlobalHydra.instance().hydra is program
        with pytest.raises(ConfigError):
            macft.compose("smoke", ["nothing=1"])
        assert hydra_compose("train", overrides=["name=mine"]).name == "mine"


def test_a_changed_configuration_is_checked_again(tmp_path: Path) -> None:
    config = macft.compose("smoke")
    config.training.steps = -1
    config.report.every = 0
    with pytest.raises(ConfigError) as told:
        macft.fit(config, folder=tmp_path / "run")
    assert [line.split(":")[0] for line in str(told.value).splitlines()] == ["training.steps", "report.every"]
    config.training.steps = "many"  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"training\.steps"):
        macft.fit(config, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("overrides", [["topology=ssh", "topology.hosts=[a,b]"], ["topology.join=host"]])
def test_runs_on_other_machines_are_left_to_the_command(overrides: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is started by the command `macft train`"):
        macft.fit(macft.compose(overrides=overrides), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Runs


@pytest.mark.slow
def test_a_run_has_results_metrics_and_events(finished: tuple[macft_run, list[Event]]) -> None:
    run, got = finished
    assert run.reason == "finished"
    assert run.results["valid_loss"] < run.results["valid_loss_before"]
    assert run.config.training.steps == 6
    assert run.adapter == run.folder / "adapters"
    rows = run.metrics()
    assert [row["step"] for row in rows] == list(range(7))
    assert set(rows[0]) == {"step", "loss/valid"}
    assert rows[3]["loss/valid"] == run.metrics()[3]["loss/valid"] < rows[0]["loss/valid"]
    assert {"loss/train", "optim/learning_rate"} <= set(rows[6])
    losses = [event.loss for event in got if isinstance(event, StepDone)]
    assert losses == [row["loss/train"] for row in rows[1:]]
    recorded = [replace(event, config_yaml="") if hasattr(event, "config_yaml") else event for event in got]
    assert run.events() == [event for event in recorded if event.is_recorded]


@pytest.mark.slow
def test_an_opened_run_is_loaded_asked_and_evaluated(finished: tuple[macft_run, list[Event]]) -> None:
    run = macft.open_run(str(finished[0].folder))
    with run.load() as model:
        answer = model.generate("SELECT", max_tokens=5, system_prompt="Write.")
        assert answer == model.generate("SELECT", max_tokens=5, system_prompt="Write.")
        chat = model.chat(max_tokens=5, temp=0.7, seed=1)
        assert "".join(chat.say("SELECT")) == model.generate("SELECT", max_tokens=5, temp=0.7, seed=1)
        with pytest.raises(ConfigError, match="temperature: no such option; there are max_tokens, temp"):
            model.chat(temperature=1.0)
        with pytest.raises(ConfigError, match="--temp: -1"):
            model.generate("SELECT", temp=-1)
    evaluation = run.evaluate(split="valid", rows=4)
    assert evaluation.rows == 4
    assert evaluation.tuned.loss < evaluation.base.loss
    assert evaluation.as_dict()["tuned"]["loss"] == evaluation.tuned.loss
    json.dumps(evaluation.as_dict(), allow_nan=False)
    with pytest.raises(DataError, match="has no check rows"):
        run.evaluate(split="check")


@pytest.mark.slow
def test_a_plan_is_data(basics: list[str]) -> None:
    plan = macft.plan_run(macft.compose(overrides=basics))
    assert plan.fits
    assert plan.steps == 6
    assert [node.refusal for node in plan.nodes] == [None]


@pytest.mark.slow
def test_a_callback_stops_the_run_and_a_resume_goes_on(basics: list[str], tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 2:
            raise macft.StopTraining

    run = macft.fit(macft.compose(overrides=basics), folder=tmp_path / "run", callbacks=[stop])
    assert run.reason == "interrupted"
    made = run.summary["steps"]
    assert 2 <= made < 6
    seen: list[Event] = []
    again = macft.resume(run.folder, ["training.steps=7"], callbacks=[seen.append])
    assert (again.reason, again.summary["steps"]) == ("finished", 7)
    assert [event.step for event in seen if isinstance(event, StepDone)] == list(range(made + 1, 8))
    assert [row["step"] for row in again.metrics()] == list(range(8))


@pytest.mark.slow
def test_a_callback_that_fails_costs_a_traceback_and_nothing_else(
    basics: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls, seen = [], []

    def broken(event: Event) -> None:
        calls.append(event)
        raise KeyError("mine")

    run = macft.fit(macft.compose(overrides=basics), folder=tmp_path / "run", callbacks=[broken, seen.append])
    assert run.reason == "finished"
    assert len(calls) == 1
    assert isinstance(seen[-1], RunEnded)
    errors = capsys.readouterr().err
    assert "a callback failed and is not called again, training goes on:" in errors
    assert "KeyError: 'mine'" in errors


@pytest.mark.slow
def test_training_works_in_another_thread_than_the_main_one(basics: list[str], tmp_path: Path) -> None:
    runs: list[macft_run] = []
    thread = threading.Thread(
        target=lambda: runs.append(macft.fit(macft.compose(overrides=basics), folder=tmp_path / "run"))
    )
    thread.start()
    thread.join(120)
    assert runs[0].reason == "finished"


@pytest.mark.slow
def test_several_processes_report_to_callbacks_and_stop_for_them(basics: list[str], tmp_path: Path) -> None:
    seen: list[Event] = []

    def stop(event: Event) -> None:
        seen.append(event)
        if isinstance(event, StepDone) and event.step == 2:
            raise macft.StopTraining

    config = macft.compose(overrides=[*basics, "topology=local", "topology.nodes=2", "training.steps=100000"])
    run = macft.fit(config, folder=tmp_path / "run", callbacks=[stop])
    assert run.reason == "interrupted"
    steps = [event.step for event in seen if isinstance(event, StepDone)]
    assert steps == list(range(1, run.summary["steps"] + 1))
    assert isinstance(seen[-1], RunEnded)


@pytest.mark.slow
def test_a_run_that_fails_in_other_processes_raises_its_reason(basics: list[str], tmp_path: Path) -> None:
    many = ["optimizer.learning_rate=1e30", "training.max_grad_norm=0", "optimizer=sgd"]
    config = macft.compose(overrides=[*basics, *many, "topology=local", "topology.nodes=2"])
    with pytest.raises(TrainingError, match="step"):
        macft.fit(config, folder=tmp_path / "run")


def test_a_run_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    for call in (macft.open_run, macft.load, macft.resume):
        with pytest.raises(ConfigError, match="does not exist"):
            call(tmp_path / "none")
    with pytest.raises(ConfigError, match="name a run's folder"):
        macft.load()


# Events from a file


def test_events_come_back_from_the_file_as_they_were(tmp_path: Path) -> None:
    energy = Energy([1.0, None], 1.0, 0.5, None, 2.0, 3.0, 0.1, 0.2, "EUR", 5.0, True)
    node = NodeStatus(tokens=4, temperature=61.5, state=1, messages=2)
    told: list[Event] = []

    class Keep:
        def handle(self, event: Event) -> None:
            told.append(event)

        def close(self) -> None: ...

    tell(Keep(), tmp_path)
    told.append(replace(step(21), nodes=[node, NodeStatus()], shares=[0.5, 0.5], loss=math.inf))
    told.append(replace(ended(tmp_path), energy=energy))
    told[0] = replace(started(tmp_path), config_yaml="")
    file = MetricsFile(tmp_path / "metrics.jsonl", first_step=0)
    for event in told:
        file.handle(event)
    file.close()
    assert list(events_in(tmp_path / "metrics.jsonl")) == [event for event in told if event.is_recorded]


def test_a_reader_follows_a_file_and_leaves_out_what_is_torn_unknown_or_old(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reader = EventReader(path, since=100.0)
    assert reader.read() == []
    line = '{"type": "noted", "time": %d, "text": "%s", "level": "info"}'
    path.write_text(line % (99, "old") + "\n" + line % (100, "first") + "\n" + '{"type": "noted", "ti')
    assert [event.text for event in reader.read()] == ["first"]  # type: ignore[attr-defined]
    with path.open("a") as file:
        file.write('me": 101, "text": "second"}\n{"type": "new_kind", "time": 101}\nnull\n[1]\n{"type": "noted"}\n')
    assert [event.text for event in reader.read()] == ["second"]  # type: ignore[attr-defined]
    (tmp_path / "new").write_text(line % (102, "rewritten") + "\n")
    (tmp_path / "new").replace(path)
    assert [event.text for event in reader.read()] == ["rewritten"]  # type: ignore[attr-defined]


# Documentation


WITH_TINY_MODEL = """
import functools, macft
macft.compose = functools.partial(lambda compose, recipe, more=(): compose(recipe, [*more, {model!r}]), macft.compose)
"""


def run_cells(cells: list[str], folder: Path, model: Path) -> str:
    """What they print, as the cells of one notebook, with a tiny model for the bundled one."""
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([WITH_TINY_MODEL.format(model=f"model={model}"), *cells])],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_page_about_python_runs_from_top_to_bottom(tmp_path: Path, tiny_model_folder: Path) -> None:
    cells = ["\n".join(block.lines) for block in blocks(ROOT / "docs" / "python.md") if block.language == "python"]
    assert len(cells) >= 4
    run_cells(cells, tmp_path, tiny_model_folder)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, tiny_model_folder: Path) -> None:
    notebook = json.loads((ROOT / "docs" / "first-adapter.ipynb").read_text())
    assert notebook["nbformat"] == 4
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in notebook["cells"] if cell["cell_type"] == "code")
    assert "finished" in run_cells(cells, tmp_path, tiny_model_folder)
