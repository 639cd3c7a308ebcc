"""Experiment trackers, each through its own library, without an account or a server."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers.level_log import records
from helpers.report_events import FINAL, HPARAMS, TOTAL, tell
from macft.config.command_line import prepare
from macft.errors import ConfigError
from macft.launch.run import run
from macft.report.events import Sample
from macft.report.run_folder import RunFolder
from macft.report.settings import TRACKERS, ReportConfig, problems
from macft.report.sinks.fan_out import FanOut
from macft.report.trackers import registry
from macft.report.trackers.sink import TrackerSink
from macft.report.trackers.tracker import TrackedRun

RUN = """
import sys
from pathlib import Path
from helpers.report_events import HPARAMS, TOTAL, tell
from macft.report.sinks import fan_out
from macft.report.run_folder import RunFolder
from macft.report.settings import ReportConfig
folder, tracker, first, until = RunFolder(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
settings = ReportConfig(every=100, tensorboard=False, trackers=[tracker], project="a-project")
reporter = fan_out.build(settings, folder, hparams=HPARAMS, is_main=True, first_step=first)
tell(reporter, folder.path, first=first, until=until)
"""
NAME = "run-monday"
"""The run's name and that of its folder."""


def report(folder: Path, tracker: str, *, first: int = 0, until: int = TOTAL, **environment: str) -> str:
    """A run's events to a tracker in a process of its own; returns what it printed on stderr."""
    offline = {
        "WANDB_MODE": "offline",
        "SWANLAB_MODE": "offline",
        "TRACKIO_DIR": str(folder.parent / "trackio"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder.parent}/mlflow.db",
        "HOME": str(folder.parent),
    }
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent / "benchmarks"), *sys.path])
    command = [sys.executable, "-c", RUN, str(folder), tracker, str(first), str(until)]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": path} | offline | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
        cwd=folder.parent,
    )
    return done.stderr


# What each library has kept, read from its own files


class Kept:
    """A run as a tracker has it: its name, its configuration, its curves (name to step to value), its state."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.config: dict[str, Any] = {}
        self.curves: dict[str, dict[int, float]] = {}
        self.results: dict[str, float] = {}
        self.state = ""

    def add(self, name: str, step: int, value: float) -> None:
        self.curves.setdefault(name, {})[step] = value


def kept_by_wandb(folder: Path) -> Kept:
    from wandb.proto import wandb_internal_pb2 as proto

    kept = Kept()
    for path in sorted(folder.glob("trackers/wandb/offline-run-*/*.wandb")):
        for data in records(path):
            record = proto.Record()
            record.ParseFromString(data)
            match record.WhichOneof("record_type"):
                case "run":
                    kept.names.append(f"{record.run.display_name} {record.run.run_id}")
                    assert record.run.project == "a-project"
                    kept.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
                case "history":
                    row = {(i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.history.item}
                    for name, value in row.items():
                        if "step" in row and not name.startswith("_"):
                            kept.add(name, row["step"], value)
                case "summary":
                    kept.results |= {
                        (i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.summary.update
                    }
                case "exit":
                    kept.state = f"exit {record.exit.exit_code}"
    return kept


def kept_by_swanlab(folder: Path) -> Kept:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    kept = Kept()
    for path in sorted(folder.glob("trackers/swanlog/run-*/*.swanlab")):
        for data in records(path):
            record = Record()
            record.ParseFromString(data)
            match record.WhichOneof("record_type"):
                case "start":
                    kept.names.append(f"{record.start.name} {record.start.id}")
                    assert record.start.project == "a-project"
                case "scalar":
                    kept.add(record.scalar.key, record.scalar.step, record.scalar.value.number)
                case "finish":
                    kept.state = str(record.finish.state)
        import yaml

        stored = yaml.safe_load((path.parent / "files" / "config.yaml").read_text())
        kept.config |= {key: item["value"] for key, item in stored.items()}
    kept.results = {name: next(iter(values.values())) for name, values in kept.curves.items()}
    return kept


def kept_by_trackio(folder: Path) -> Kept:
    kept = Kept()
    with sqlite3.connect(folder.parent / "trackio" / "a-project.db") as base:
        for name, step, values in base.execute("select run_name, step, metrics from metrics order by id"):
            kept.names.append(name)
            for key, value in json.loads(values).items():
                kept.add(key, step, value)
        ((config,),) = base.execute("select config from configs")
    flat = json.loads(config)
    kept.config = {"seed": flat["seed"], "adapter": {"rank": flat["adapter.rank"]}}
    kept.names = sorted(set(kept.names))
    kept.results = {name: max(values.items())[1] for name, values in kept.curves.items()}
    return kept


def kept_by_mlflow(folder: Path) -> Kept:
    kept = Kept()
    with sqlite3.connect(folder.parent / "mlflow.db") as base:
        kept.names = [name for (name,) in base.execute("select name from runs")]
        assert [name for (name,) in base.execute("select name from experiments")] == ["Default", "a-project"]
        ((kept.state,),) = base.execute("select status from runs")
        params = dict(base.execute("select key, value from params"))
        kept.config = {"seed": int(params["seed"]), "adapter": {"rank": int(params["adapter.rank"])}}
        for name, step, value in base.execute("select key, step, value from metrics"):
            kept.add(name, step, value)
        kept.results = dict(base.execute("select key, value from latest_metrics"))
    return kept


READERS = {"wandb": kept_by_wandb, "swanlab": kept_by_swanlab, "trackio": kept_by_trackio, "mlflow": kept_by_mlflow}


def test_every_tracker_is_tested() -> None:
    assert set(READERS) == set(TRACKERS) == set(registry._KINDS)


@pytest.mark.slow
@pytest.mark.parametrize("tracker", READERS)
def test_a_tracker_gets_name_configuration_curves_and_results_and_a_resumed_run_goes_on_in_it(
    tracker: str, tmp_path: Path
) -> None:
    folder = tmp_path / "monday"
    report(folder, tracker, until=10)
    printed = report(folder, tracker, first=10)
    assert "stops reporting" not in printed
    kept = READERS[tracker](folder)
    assert len(set(kept.names)) == 1, "the resumed run is another one to the tracker"
    assert kept.names[0].startswith(NAME)
    assert kept.config["seed"] == HPARAMS["seed"]
    assert kept.config["adapter"]["rank"] == 8
    assert sorted(kept.curves["loss/train"]) == list(range(1, TOTAL + 1))
    assert kept.curves["loss/train"][TOTAL] == pytest.approx(2.0)
    assert kept.curves["loss/valid"] == pytest.approx({0: 3.5, 10: 2.5, 20: 1.5})
    assert kept.curves["metric/sql_execution"] == pytest.approx({0: 0.125, 20: 0.75})
    assert {"optim/learning_rate", "throughput/tokens_per_second"} <= set(kept.curves)
    assert kept.results["result/valid_loss"] == pytest.approx(FINAL["valid_loss"])
    shown = [path for path in tmp_path.rglob("*") if path.is_file() and b"herring" in path.read_bytes()]
    assert shown, "the samples are nowhere"
    if tracker in ("wandb", "mlflow"):
        assert kept.state == {"wandb": "exit 0", "mlflow": "FINISHED"}[tracker]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tracker", "environment", "reason"),
    [
        ("wandb", {"WANDB_MODE": "online"}, "you are not logged in; run `wandb login`, or set WANDB_MODE=offline"),
        ("mlflow", {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}, "127.0.0.1"),
    ],
)
def test_a_tracker_that_cannot_be_reached_costs_one_line(
    tracker: str, environment: dict[str, str], reason: str, tmp_path: Path
) -> None:
    printed = report(tmp_path / "monday", tracker, **environment)
    (line,) = [line for line in printed.splitlines() if "stops reporting" in line]
    assert line.startswith(f"{tracker} stops reporting, training goes on: ")
    assert reason in line
    recorded = (tmp_path / "monday" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(recorded[-1])["type"] == "run_ended"


# The thread between a run and its tracker


class Breaks:
    """A tracker that fails at step 3."""

    def __init__(self, _run: TrackedRun):
        self.got: list[int] = []

    def log(self, values: Mapping[str, float], step: int) -> None:  # noqa: ARG002
        self.got.append(step)
        if step == 3:
            raise SystemExit("the server\nhas gone")  # as libraries do that were written for scripts

    def show(self, samples: Sequence[Sample], step: int) -> None: ...

    def finish(self, results: Mapping[str, float], reason: str) -> None:
        raise AssertionError(results, reason)


def tracked(folder: Path) -> TrackedRun:
    return TrackedRun("project", "name", "id", folder, HPARAMS)


def test_a_tracker_that_fails_while_training_is_dropped_with_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sinks = FanOut([TrackerSink("wandb", Breaks, tracked(tmp_path))])
    tell(sinks, tmp_path)
    assert capsys.readouterr().err == "wandb stops reporting, training goes on: the server has gone\n"
    assert not [thread for thread in threading.enumerate() if thread.name == "macft-wandb"]


def test_a_tracker_that_does_not_answer_holds_nothing_up_until_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = threading.Event()
    steps: list[int] = []

    class Silent:
        def __init__(self, _run: TrackedRun):
            answer.wait()

        def log(self, values: Mapping[str, float], step: int) -> None:  # noqa: ARG002
            steps.append(step)

        def show(self, samples: Sequence[Sample], step: int) -> None: ...

        def finish(self, results: Mapping[str, float], reason: str) -> None:
            steps.append(-1)
            assert results["result/valid_loss"] == 1.25
            assert reason == "finished"

    monkeypatch.setattr("macft.report.trackers.sink._SAY_AFTER_SECONDS", 0.01)
    monkeypatch.setattr("macft.report.trackers.sink._FINISH_SECONDS", 0.01)
    sink = TrackerSink("mlflow", Silent, tracked(tmp_path))
    sinks = FanOut([sink])
    tell(sinks, tmp_path)
    printed = capsys.readouterr().err.splitlines()
    assert printed[0] == "mlflow: sending the rest of the run"
    assert printed[1].startswith("mlflow stops reporting, training goes on: it has not taken the rest")
    answer.set()
    sink._thread.join()
    assert steps[-2:] == [TOTAL, -1]


def test_too_much_waiting_for_a_tracker_drops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()

    class Slow(Breaks):
        def __init__(self, run: TrackedRun):
            assert answer.wait(60)
            super().__init__(run)

    monkeypatch.setattr("macft.report.trackers.sink._MOST_WAITING", 5)
    sink = TrackerSink("wandb", Slow, tracked(tmp_path))
    with pytest.raises(TimeoutError, match="5 events wait"):
        tell(sink, tmp_path)
    sink.close()  # FanOut does so with a sink that has failed
    answer.set()
    sink._thread.join()


# Settings


def test_wrong_names_are_told() -> None:
    assert problems(ReportConfig(trackers=["wandb"])) == []
    assert problems(ReportConfig(trackers=["tensorboardx"])) == [
        "report.trackers: 'tensorboardx' is not one of wandb, swanlab, trackio, mlflow"
    ]
    assert problems(ReportConfig(trackers=["mlflow"], project="a b"))[0].startswith("report.project:")


@pytest.mark.parametrize("topology", [[], ["topology=local", "topology.nodes=2"]])
def test_a_tracker_that_is_not_installed_is_told_before_anything_loads(
    topology: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "swanlab", None)
    config = prepare(["+recipe=smoke", "report.trackers=[swanlab]", *topology]).job
    assert config is not None
    with pytest.raises(ConfigError) as told:
        run(config, tmp_path / "run", resume=False, farewell=str)
    assert str(told.value) == "report.trackers: swanlab is not installed; run: python3 -m pip install swanlab"
    assert not RunFolder(tmp_path / "run").config.exists()


def test_an_id_is_the_same_on_each_node_and_after_a_resume(tmp_path: Path) -> None:
    config = {**HPARAMS, "dataset": {"template_time": "2026-01-31T12:00:00"}}
    for node in "ab":
        RunFolder(tmp_path / node).trackers.mkdir(parents=True)
    first = registry.run_id(RunFolder(tmp_path / "a"), config)
    assert registry.run_id(RunFolder(tmp_path / "b"), config) == first
    resumed = {**config, "training": {"steps": 99}}
    assert registry.run_id(RunFolder(tmp_path / "a"), resumed) == first
