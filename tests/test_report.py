"""What a run reports: on a terminal, in a log, in TensorBoard and in its folder."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import pty
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from rich.console import Console

from helpers.report_events import FINAL, HPARAMS, PARTS, SAMPLE, TOTAL, build, ended, started, step, tell
from macft.config.paths import config_folder
from macft.parallel.node_status import NodeStatus
from macft.report.event_bytes import pack_events, unpack_events
from macft.report.events import (
    NOT_RECORDED,
    BlocksMoved,
    CheckpointSaved,
    Evaluated,
    Event,
    NodesChanged,
    Noted,
    ReplayedEvent,
    RunEnded,
    SamplesShown,
)
from macft.report.run_folder import RunFolder, write_atomically
from macft.report.scalars import Scalars
from macft.report.settings import ReportConfig, problems
from macft.report.sinks import fan_out
from macft.report.sinks.console import ConsoleReporter
from macft.report.sinks.metrics_file import MetricsFile, plain
from macft.report.sinks.summary import SummaryWriter
from macft.report.sinks.tensorboard import TensorBoard


def lines(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The events in metrics.jsonl, read by a parser that takes no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    found = [json.loads(line, parse_constant=refuse) for line in path.read_text().split("\n")[:-1]]
    return [event for event in found if kind in (None, event["type"])]


# Settings


def test_the_yaml_lists_the_schemas_keys_and_defaults() -> None:
    assert OmegaConf.load(config_folder() / "report" / "default.yaml") == asdict(ReportConfig())


def test_settings_that_cannot_be_right_are_named() -> None:
    assert problems(ReportConfig()) == []
    assert [line.split(":")[0] for line in problems(ReportConfig(every=0, samples=-1, log_level="all"))] == [
        "report.every",
        "report.samples",
        "report.log_level",
    ]


# Console


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Console]:
    """A console whose output goes to a file, ``log.txt``."""
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.delenv("TTY_COMPATIBLE", raising=False)
    with (tmp_path / "log.txt").open("w", encoding="utf-8") as file:
        yield Console(file=file, highlight=False)


def test_a_log_gets_plain_short_lines(log: Console, tmp_path: Path) -> None:
    tell(ConsoleReporter(every=5, console=log), tmp_path)
    log.file.flush()
    text = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert all(letter == "\n" or letter.isprintable() for letter in text)
    assert not set("│╭╰━") & set(text)
    shown = text.splitlines()
    assert max(len(line) for line in shown if str(tmp_path) not in line) <= 100
    steps = [line for line in shown if "tokens/s" in line and line.startswith("step")]
    assert [line.split("/")[0].split()[-1] for line in steps] == ["1", "5", "10", "15", "20"]
    assert "loss  2.000" in steps[-1]
    assert "800 tokens/s" in steps[-1]
    assert "left 0:08" in steps[1]  # 15 steps of 0.5 s, rounded half to even
    assert "warning: the disk is nearly full" in shown


def test_the_end_tells_before_and_after_and_how_to_use_the_adapter(log: Console, tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    (folder / "adapters").mkdir(parents=True)
    (folder / "events.out.tfevents.1").touch()
    (folder / "adapters" / "adapter_config.json").write_text(json.dumps({"model": "/models/base"}))
    tell(ConsoleReporter(every=100, console=log), folder)
    log.file.flush()
    text = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert "validation loss  3.500 → 1.250" in text
    assert "sql execution    12.5% → 75.0%" in text
    # The base model as mlx-lm knows it, paths quoted, on one line to be copied.
    expected = f"mlx_lm.generate --model /models/base --adapter-path '{folder}/adapters' --prompt \"...\""
    assert f"with mlx-lm: {expected}\n" in text
    assert f"try it: python -m macft.generate '{folder}'\n" in text
    assert f"curves: tensorboard --logdir '{folder}'\n" in text


@pytest.mark.parametrize("config", [None, "{torn", "[]", '{"model": 3}'])
def test_without_a_readable_adapter_config_the_run_model_stands_in(
    config: str | None, log: Console, tmp_path: Path
) -> None:
    if config is not None:
        (tmp_path / "adapters").mkdir()
        (tmp_path / "adapters" / "adapter_config.json").write_text(config)
    tell(ConsoleReporter(every=100, console=log), tmp_path)
    log.file.flush()
    assert "--model bundled-name --adapter-path" in (tmp_path / "log.txt").read_text(encoding="utf-8")


def test_a_wholly_saved_model_needs_no_adapter_path(log: Console, tmp_path: Path) -> None:
    RunFolder(tmp_path).model.mkdir()
    tell(ConsoleReporter(every=100, console=log), tmp_path)
    log.file.flush()
    text = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert f'with mlx-lm: mlx_lm.generate --model {tmp_path}/model --prompt "..."\n' in text


def test_the_end_of_a_run_says_how_to_go_on(log: Console, tmp_path: Path) -> None:
    reporter = ConsoleReporter(every=10, console=log)
    reporter.handle(RunEnded("interrupted", 1, 1.0, detail="continue with: +resume='runs/[a]'"))
    log.file.flush()
    text = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert text.startswith("Interrupted\n  time  1 step, 0:01\n")
    assert "+resume='runs/[a]'" in text  # brackets are text, not rich's markup


def test_an_error_is_told_once_by_the_command(log: Console, tmp_path: Path) -> None:
    ConsoleReporter(every=10, console=log).handle(RunEnded("failed", 3, 1.0, detail="the loss became NaN at step 3"))
    log.file.flush()
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == "Failed\n  time  3 steps, 0:01\n"


def test_a_terminal_gets_panels_and_a_live_bar_and_is_left_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    master, slave = pty.openpty()
    received = bytearray()

    def drain() -> None:
        while True:
            try:
                piece = os.read(master, 65536)
            except OSError:  # Linux: the other side is closed
                return
            if not piece:
                return
            received.extend(piece)

    reader = threading.Thread(target=drain)
    reader.start()
    with os.fdopen(slave, "w", encoding="utf-8") as file:
        console = Console(file=file, width=100, highlight=False)
        assert console.is_terminal
        before = set(threading.enumerate())
        tell(ConsoleReporter(every=5, console=console), tmp_path)
        for thread in set(threading.enumerate()) - before:  # rich tells its thread to end, and doesn't wait for it
            thread.join(30)
            assert not thread.is_alive()
    reader.join()
    os.close(master)
    text = re.sub(r"\x1b\[[0-9;]*m", "", received.decode())  # without colours
    for part in ("╭─ macft", "━", "╭─ sample 1 of 1", "╭─ Finished", "validation loss", "tokens/s"):
        assert part in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is visible again
    # What a model answers can't steer the terminal, nor is it taken for rich's markup.
    assert "\x07" not in text
    assert "✗ �[31mred� [bold]herring" in text


def test_a_terminal_of_20_columns_shows_every_result(tmp_path: Path) -> None:
    file = io.StringIO()
    console = ConsoleReporter(every=1, console=Console(file=file, width=20, highlight=False, force_terminal=True))
    for event in (started(tmp_path), step(1), ended(tmp_path)):
        console.handle(event)
    console.close()
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).splitlines()]
    words = " ".join(lines)
    for part in ("validation loss 3.500 → 1.250", "speed", "tokens/s", "adapter lora rank 8"):
        assert part in words


def test_a_terminal_of_60_columns_shows_whole_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    folder = tmp_path / "experiment" / "2026-01-31_12-00-00"
    file = io.StringIO()
    console = ConsoleReporter(every=1, console=Console(file=file, width=60, highlight=False, force_terminal=True))
    for event in (started(folder), step(1), Noted(" ".join(["temperature"] * 12), "info"), ended(folder)):
        console.handle(event)
    console.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).replace("\r", "\n")
    lines = [line for line in text.splitlines() if "training" not in line and "generate" not in line]
    assert max(map(len, lines)) <= 60
    words = [word for line in lines for word in line.split()]
    assert words.count("temperature") == 12
    assert "step  1/20  loss  3.900  lr 1.00e-04  grad   1.50" in lines
    assert "  800 tokens/s   0.50 s/step  left 0:10" in lines
    assert [word for word in words if word.endswith("2026-01-31_12-00-00")]


@pytest.mark.parametrize(
    ("width", "end"), [(100, "0.50 s/step  left 0:10"), (80, "800 tokens/s   0.50 s/step"), (70, "800 tokens/s")]
)
def test_a_step_has_one_line_where_the_bar_has_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, end: str
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    file = io.StringIO()
    console = ConsoleReporter(every=1, console=Console(file=file, width=width, highlight=False, force_terminal=True))
    console.handle(started(tmp_path))
    console.handle(step(1))
    console.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).replace("\r", "\n")
    (line,) = [line for line in text.splitlines() if "grad" in line]
    assert line.endswith(end)


# TensorBoard


def accumulated(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    keep_all = {
        "scalars": 0,
        "tensors": 0,
        "compressedHistograms": 0,
        "images": 0,
        "audio": 0,
        "histograms": 0,
    }
    return EventAccumulator(str(folder), size_guidance=keep_all).Reload()


def scalars(accumulator: Any, tag: str) -> dict[int, float]:
    """Values by step; each step must stand once."""
    events = accumulator.Scalars(tag)
    assert len({event.step for event in events}) == len(events)
    return {event.step: event.value for event in events}


def served(folder: Path, tag: str) -> list[int]:
    """The steps of a curve as TensorBoard's server has them; it reads by other code than its accumulator."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    return [event.step for event in EventAccumulator(str(folder)).Reload().Tensors(tag)]


def texts(accumulator: Any, tag: str) -> list[str]:
    return [event.tensor_proto.string_val[0].decode() for event in accumulator.Tensors(tag)]


def test_tensorboard_reads_back_every_scalar(tmp_path: Path) -> None:
    tell(TensorBoard(tmp_path, hparams=HPARAMS, first_step=0), tmp_path)
    found = accumulated(tmp_path)
    expected = {
        "loss/train": 2.0,
        "loss/valid": 1.5,
        "optim/learning_rate": 1e-4,
        "optim/grad_norm": 1.5,
        "throughput/tokens_per_second": 800.0,
        "throughput/target_tokens_per_second": 200.0,
        "time/step": 0.5,
        **{f"time/{name}": seconds for name, seconds in PARTS.items()},
        "system/network/bytes_sent": 4096,
        "system/network/codec_residual_norm": 0.25,
        "system/memory/peak_gb": 2.0,
        "system/memory/active_gb": 1.0,
        "system/checkpoint/write_seconds": 0.1,
        "system/checkpoint/training_waited_seconds": 0.01,
        "optim/epoch": TOTAL / 300,
        "metric/sql_execution": 0.75,
        **{f"result/{name}": value for name, value in FINAL.items() if not name.endswith("_before")},
        "result/seconds": 12.5,
    }
    assert set(found.Tags()["scalars"]) == set(expected)
    for tag, value in expected.items():
        assert scalars(found, tag)[TOTAL] == pytest.approx(value), tag
    assert list(scalars(found, "loss/train")) == list(range(1, TOTAL + 1))
    assert list(scalars(found, "metric/sql_execution")) == [0, TOTAL]


def test_what_is_always_zero_has_no_curve_and_what_becomes_zero_has(tmp_path: Path) -> None:
    named = Scalars()
    waited = "system/checkpoint/training_waited_seconds"
    saved = [CheckpointSaved(number, tmp_path, False, 0.1, wait) for number, wait in ((1, 0.0), (2, 0.5), (3, 0.0))]
    assert [named.of(event).get(waited) for event in saved] == [None, 0.5, 0.0]
    alone = dataclasses.replace(step(1), bytes_sent=0, residual_norm=0.0, learning_rate=0.0)
    assert not {name for name in named.of(alone) if "network" in name}
    assert named.of(alone)["optim/learning_rate"] == 0.0
    two = dataclasses.replace(alone, nodes=[NodeStatus(), NodeStatus()], shares=[1.0, 0.0])
    assert "time/all_reduce" in named.of(two)
    assert "time/all_reduce" not in named.of(dataclasses.replace(alone, nodes=[NodeStatus()]))
    assert named.of(two)["system/cluster/share_rank1"] == 0.0
    assert "system/cluster/generation" not in named.of(two)
    assert named.of(dataclasses.replace(two, generation=1))["system/cluster/generation"] == 1.0


def test_tensorboard_reads_back_the_texts(tmp_path: Path) -> None:
    tell(TensorBoard(tmp_path, hparams=HPARAMS, first_step=0), tmp_path)
    found = accumulated(tmp_path)
    assert set(found.PluginTagToContent("text")) == {"config", "notes", "samples"}
    assert texts(found, "config") == ["```yaml\nmodel:\n  path: tiny\n```"]
    assert texts(found, "notes")[-1].splitlines()[-2:] == [
        "- weights dequantised to float32",
        "- warning: the disk is nearly full",
    ]
    header, rule, row = texts(found, "samples")[0].split("\n")
    assert header.count("|") == rule.count("|") == row.count("|") == 5
    assert "How many &#124; rows?" in row
    assert "x &lt; 5" in row
    assert "✗" in row.split("|")[3]
    assert "✓ SELECT 1" in row.split("|")[4]


def session_groups(logdir: Path) -> dict[str, Any]:
    """What the HPARAMS tab shows for ``logdir``, by run, as TensorBoard's own backend computes it."""
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import api_pb2, list_session_groups
    from tensorboard.plugins.hparams.backend_context import Context

    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(logdir)).Reload()
    provider = MultiplexerDataProvider(multiplexer, str(logdir))
    statuses = [
        api_pb2.STATUS_UNKNOWN,
        api_pb2.STATUS_SUCCESS,
        api_pb2.STATUS_FAILURE,
        api_pb2.STATUS_RUNNING,
    ]
    request = api_pb2.ListSessionGroupsRequest(
        allowed_statuses=statuses,
        aggregation_type=api_pb2.AGGREGATION_AVG,
        slice_size=100,
    )
    context = Context(TBContext(data_provider=provider, logdir=str(logdir)))
    response = list_session_groups.Handler(RequestContext(), context, "", request).run()
    return {group.sessions[0].name: group for group in response.session_groups}


def test_the_hparams_tab_shows_a_sweeps_runs_side_by_side(tmp_path: Path) -> None:
    from tensorboard.plugins.hparams import api_pb2

    # Runs of the same name in two sweeps stay apart.
    for sweep, rank in (("first", 4), ("second", 16)):
        folder = tmp_path / sweep / "0"
        hparams = {**HPARAMS, "adapter": {**HPARAMS["adapter"], "rank": rank}, "report": {"hparams": SWEPT}}
        tell(TensorBoard(folder, hparams=hparams, first_step=0), folder)
    groups = session_groups(tmp_path)
    assert set(groups) == {"first/0", "second/0"}
    group = groups["second/0"]
    shown = {name: getattr(value, value.WhichOneof("kind")) for name, value in group.hparams.items()}
    assert shown == {
        "optimizer.arguments.eps": 1e-8,
        "adapter.type": "lora",
        "adapter.rank": 16,
        "model.path": "tiny",
        "dataset.path": "sql",
        "optimizer.learning_rate": 1e-4,
        "training.steps": TOTAL,
        "topology.nodes": 2,
        "seed": 7,
    }
    results = {value.name.tag: value.value for value in group.metric_values}
    expected = {f"result/{name}": value for name, value in FINAL.items() if not name.endswith("_before")}
    assert results == pytest.approx({**expected, "result/seconds": 12.5})
    assert group.sessions[0].status == api_pb2.STATUS_SUCCESS
    assert group.sessions[0].end_time_secs >= group.sessions[0].start_time_secs > 0


def test_the_hparams_tab_has_the_swept_keys_first(tmp_path: Path) -> None:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    tell(TensorBoard(tmp_path, hparams={**HPARAMS, "report": {"hparams": SWEPT}}, first_step=0), tmp_path)
    content = accumulated(tmp_path).SummaryMetadata("_hparams_/experiment").plugin_data.content
    columns = HParamsPluginData.FromString(content).experiment.hparam_infos
    # TensorBoard sorts by this.
    assert {each.name for each in columns if each.differs} == {
        "optimizer.arguments.eps",
        "adapter.type",
        "adapter.rank",
    }
    assert "model.path" in {each.name for each in columns}


SWEPT = ["optimizer.arguments.eps", "adapter"]


def test_the_hparams_tab_tells_success_from_failure(tmp_path: Path) -> None:
    from tensorboard.plugins.hparams import api_pb2

    expected = {"failed": api_pb2.STATUS_FAILURE, "early_stopped": api_pb2.STATUS_SUCCESS}
    for reason in expected:
        reporter = TensorBoard(tmp_path / reason, hparams=HPARAMS, first_step=0)
        reporter.handle(started(tmp_path))
        reporter.handle(RunEnded(reason, 3, 1.0))
        reporter.close()
    assert {name: group.sessions[0].status for name, group in session_groups(tmp_path).items()} == expected


def next_second() -> None:
    """Waits for a second in which no event file was made: TensorBoard orders files by the second in their names."""
    begun = int(time.time())
    while int(time.time()) == begun:
        time.sleep(0.02)


def test_a_resumed_runs_curves_do_not_double_back(tmp_path: Path) -> None:
    from tensorboard.plugins.hparams import api_pb2

    folder = tmp_path / "run"
    tell(TensorBoard(folder, hparams=HPARAMS, first_step=0), tmp_path, until=17)
    assert session_groups(tmp_path)["run"].sessions[0].status != api_pb2.STATUS_SUCCESS
    next_second()
    reporter = TensorBoard(folder, hparams=HPARAMS, first_step=10)
    reporter.handle(started(tmp_path, 10))
    reporter.handle(step(11, loss=9.0))
    reporter.handle(ended(tmp_path, steps=11))
    reporter.close()
    assert len(list(folder.iterdir())) == 2
    found = accumulated(folder)
    losses = scalars(found, "loss/train")
    assert list(losses) == list(range(1, 12))
    assert (losses[10], losses[11]) == (3.0, 9.0)
    assert list(scalars(found, "loss/valid")) == [0, 10]
    assert served(folder, "loss/train") == list(losses)
    assert served(folder, "loss/valid") == [0, 10]
    assert session_groups(tmp_path)["run"].sessions[0].status == api_pb2.STATUS_SUCCESS


def test_a_run_that_begins_anew_leaves_nothing_of_the_first_attempt(tmp_path: Path) -> None:
    tell(TensorBoard(tmp_path / "tb", hparams=HPARAMS, first_step=0), tmp_path, until=7)
    next_second()
    tell(TensorBoard(tmp_path / "tb", hparams=HPARAMS, first_step=0), tmp_path, until=3)
    found = accumulated(tmp_path / "tb")
    assert list(scalars(found, "loss/train")) == [1, 2, 3]
    assert list(scalars(found, "loss/valid")) == [0]
    assert served(tmp_path / "tb", "loss/train") == [1, 2, 3]


# metrics.jsonl


def test_each_event_is_a_line_that_is_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reporter = MetricsFile(path, first_step=0)
    reporter.handle(started(tmp_path))
    reporter.handle(step(1))
    first, second = lines(path)
    assert first["type"] == "run_started"
    assert "config_yaml" not in first
    assert first["run_folder"] == str(tmp_path)
    assert {**asdict(step(1)), "type": "step_done", "time": second["time"]} == second
    reporter.handle(SamplesShown(TOTAL, [SAMPLE]))
    assert lines(path, "samples_shown")[0]["samples"] == [asdict(SAMPLE)]
    reporter.close()


def test_a_nodes_status_keeps_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reporter = MetricsFile(path, first_step=0)
    reporter.handle(replace(step(1), nodes=[NodeStatus(tokens=3, messages=2)], shares=[1.0]))
    reporter.close()
    keys = "tokens busy_seconds duty paused reason temperature state watts peak_watts joules metered_seconds estimated"
    [node] = lines(path)[0]["nodes"]
    assert list(node) == [*keys.split(), "remarks", "disk_seconds", "wait_seconds", "wire_seconds", "peak_memory"]
    assert (node["tokens"], node["remarks"]) == (3, 2)


def test_where_the_time_of_a_stage_went() -> None:
    first = NodeStatus(busy_seconds=3.0, wait_seconds=1.0, disk_seconds=0.5, wire_seconds=0.25)
    nodes = [first, NodeStatus(busy_seconds=2.0)]
    values = Scalars().of(replace(step(1), nodes=nodes, shares=[0.5, 0.5], blocks=[5, 1]))
    of_stages = {name: value for name, value in values.items() if name.startswith("stage/")}
    assert of_stages == {
        "stage/compute_rank0": 1.5,
        "stage/wait_rank0": 1.0,
        "stage/disk_rank0": 0.5,
        "stage/wire_rank0": 0.25,
        "stage/blocks_rank0": 5.0,
        "stage/blocks_rank1": 1.0,
    }


def test_blocks_that_move_are_one_line() -> None:
    layout = "rank 0: blocks 0-4 > rank 1: blocks 5-5; rank 2 without a stage"
    moved = BlocksMoved(4, [2, 2, 2], [5, 1, 0], ["", "temperature", ""], 0.42, layout)
    assert moved.line == (
        "rank 1 hands over 1 block (temperature), rank 2 hands over 2 blocks (slower than others); "
        f"now {layout}; a step is expected to take 42% less time"
    )
    assert unpack_events(pack_events([moved])) == [moved]


def test_a_loss_that_is_no_number_is_still_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reporter = MetricsFile(path, first_step=0)
    for loss in (math.nan, math.inf, -math.inf):
        reporter.handle(step(1, loss))
    reporter.close()
    assert [event["loss"] for event in lines(path)] == ["nan", "inf", "-inf"]


def test_numpy_scalars_are_numbers() -> None:
    values = {"a": np.float32(0.5), "b": np.int64(3), "c": np.float64("nan")}
    assert plain(values) == {"a": 0.5, "b": 3, "c": "nan"}


@pytest.mark.slow
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_plain_values_are_always_json(value: Any) -> None:
    assert json.loads(json.dumps(plain(value), allow_nan=False)) == plain(value)


@pytest.mark.slow
@given(until=st.integers(0, 19), first=st.integers(0, 19), torn=st.binary(max_size=40))
def test_after_a_resume_each_step_stands_once(
    until: int, first: int, torn: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first = min(first, until)
    path = tmp_path_factory.mktemp("resume") / "metrics.jsonl"
    tell(MetricsFile(path, first_step=0), path.parent, until=until)
    with path.open("ab") as file:
        file.write(torn.replace(b"\n", b" "))  # a kill in the middle of a line, whatever stood there
    tell(MetricsFile(path, first_step=first), path.parent, first=first)
    assert [event["step"] for event in lines(path, "step_done")] == list(range(1, TOTAL + 1))
    assert [event["step"] for event in lines(path, "evaluated")] == [0, 10, 20]
    assert [event["when"] for event in lines(path, "metric_scored")] == ["before", "after"]
    assert [event["reason"] for event in lines(path, "run_ended")] == ["interrupted", "finished"]
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"type": "step_done", "step": 1}\n{"type": "step_done", "step": 2}')
    reporter = MetricsFile(path, first_step=2)
    reporter.handle(step(3))
    reporter.close()
    assert [event["step"] for event in lines(path)] == [1, 2, 3]


def test_resuming_a_finished_run_repeats_only_its_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tell(MetricsFile(path, first_step=0), tmp_path)
    tell(MetricsFile(path, first_step=TOTAL), tmp_path, first=TOTAL)
    assert [event["step"] for event in lines(path, "step_done")] == list(range(1, TOTAL + 1))
    assert [event["when"] for event in lines(path, "metric_scored")] == ["before", "after"]
    assert len(lines(path, "samples_shown")) == 1


# The folder and the summary


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_summary_tells_what_came_of_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    tell(SummaryWriter(folder), tmp_path)
    summary = json.loads(folder.summary.read_text())
    assert summary["reason"] == "finished"
    assert summary["results"] == FINAL
    assert summary["tokens_per_second"] == 800.0
    assert summary["peak_memory_bytes"] == 2_000_000_000
    assert summary["adapter_folder"] == str(tmp_path / "adapters")
    assert summary["adapter_sha256"] == "ab" * 32
    assert {"macft", "mlx", "mlx-lm", "python", "platform"} <= set(summary["versions"])
    text = folder.summary_text.read_text()
    assert "| validation loss | 3.500 | 1.250 |" in text
    assert "| question | expected | before | after |" in text
    assert "| sql execution | 12.5% | 75.0% |" in text
    assert "| model | bundled-name |" in text
    assert "| peak memory | 2.00 GB |" in text


def test_a_run_that_fails_at_once_with_a_loss_of_nan_has_a_summary(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    reporter = SummaryWriter(folder)
    reporter.handle(RunEnded("failed", 0, 0.1, {"valid_loss": math.nan}, detail="a | b"))
    summary = json.loads(folder.summary.read_text())
    assert (summary["reason"], summary["detail"], summary["results"]) == (
        "failed",
        "a | b",
        {"valid_loss": "nan"},
    )
    assert summary["tokens_per_second"] is None
    assert "| detail | a \\| b |" in folder.summary_text.read_text()


# All together


@dataclass(frozen=True)
class WeightsPublished(Event):
    """An event that no sink has heard of."""

    step: int
    path: Path
    token: str = field(metadata=NOT_RECORDED)


@dataclass(frozen=True)
class LossSpiked(ReplayedEvent):
    """Another one, to be replayed by a rank that takes over."""

    loss: float


def test_a_new_event_needs_no_change_of_the_sinks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leader, follower = (
        fan_out.build(ReportConfig(), RunFolder(tmp_path), hparams=HPARAMS, is_main=is_main, first_step=0)
        for is_main in (True, False)
    )
    leader.handle(WeightsPublished(1, tmp_path, "secret"))
    for number in (1, 2):
        for reporter in (leader, follower):
            reporter.handle(step(number))
            reporter.handle(LossSpiked(number, 9.0))
    leader.close()
    follower.handle(WeightsPublished(3, tmp_path, "secret"))  # only a leader reports it
    follower.handle(step(3))
    follower.handle(LossSpiked(3, math.inf))
    follower.lead(is_main=True, step=3)
    follower.handle(LossSpiked(4, 8.0))
    follower.close()
    events = [event for event in lines(RunFolder(tmp_path).metrics) if event["type"] != "step_done"]
    assert events[0] == {"type": "weights_published", "time": events[0]["time"], "step": 1, "path": str(tmp_path)}
    assert [(event["type"], event["step"], event["loss"]) for event in events[1:]] == [
        ("loss_spiked", 1, 9.0),
        ("loss_spiked", 2, 9.0),
        ("loss_spiked", 3, "inf"),
        ("loss_spiked", 4, 8.0),
    ]
    assert capsys.readouterr().err == ""


def test_rank_0_writes_what_was_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything, little = RunFolder(tmp_path / "deep" / "run"), RunFolder(tmp_path / "little")
    tell(build(everything), everything.path)
    curves = [path.name for path in everything.curves]
    assert len(curves) == 1
    assert {entry.name for entry in everything.path.iterdir()} == {
        "metrics.jsonl",
        "summary.json",
        "summary.md",
        *curves,
    }
    assert "Finished" in capsys.readouterr().out
    tell(build(little, console=False, tensorboard=False, metrics_file=False), little.path)
    assert {entry.name for entry in little.path.iterdir()} == {"summary.json", "summary.md"}
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "")


def test_other_ranks_write_nothing_and_say_how_it_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(tmp_path / "run")
    tell(fan_out.build(ReportConfig(), folder, hparams={}, is_main=False, first_step=0), folder.path)
    assert not folder.path.exists()
    assert capsys.readouterr().out == f"finished; adapter sha256 {'ab' * 32}\n"


def test_a_newcomer_says_that_it_has_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(tmp_path / "run")
    for is_newcomer in (False, True):
        reporter = fan_out.build(
            ReportConfig(), folder, hparams={}, is_main=False, first_step=0, is_newcomer=is_newcomer
        )
        reporter.handle(NodesChanged(3, 1, ["air", "pro"], {}, ["pro"], [0.5, 0.5], False, 0.2))
    line = "after step 3: pro joins; 2 nodes now: air 50%, pro 50%; no step was lost, 0.2 s\n"
    assert capsys.readouterr().out == line


@pytest.mark.slow
@given(lost=st.integers(1, TOTAL), is_validation_told=st.booleans(), behind=st.booleans())
@settings(deadline=None, max_examples=20)
def test_who_takes_over_tells_what_the_lost_node_could_not(lost: int, is_validation_told: bool, behind: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = RunFolder(Path(name))
        config = ReportConfig(console=False)
        first, second = (
            fan_out.build(config, folder, hparams=HPARAMS, is_main=is_main, first_step=0) for is_main in (True, False)
        )
        done = lost - behind  # the one that takes over may not have come as far
        for reporter, until in ((first, lost), (second, done)):
            reporter.handle(started(folder.path))
            reporter.handle(Evaluated(0, 3.5, 900, 1.0, True))
            for number in range(1, until + 1):
                reporter.handle(step(number))
                if reporter is second or number < lost or is_validation_told:
                    reporter.handle(Evaluated(number, 3.0, 900, 1.0, True))
        # The first one is not closed: it was killed.
        second.lead(is_main=True, step=done)
        for number in range(done + 1, TOTAL + 1):
            second.handle(step(number))
            second.handle(Evaluated(number, 3.0, 900, 1.0, True))
        second.close()
        assert [event["step"] for event in lines(folder.metrics, "step_done")] == list(range(1, TOTAL + 1))
        assert [event["step"] for event in lines(folder.metrics, "evaluated")] == list(range(TOTAL + 1))
        curves = accumulated(folder.path)
        assert list(scalars(curves, "loss/train")) == list(range(1, TOTAL + 1))
        assert list(scalars(curves, "loss/valid")) == list(range(TOTAL + 1))
        first.close()


def test_a_reporter_that_cannot_be_set_up_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.mkdir()  # where the file belongs
    tell(build(folder, console=False, tensorboard=False), tmp_path)
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("metrics.jsonl stops reporting, training goes on: ")
    assert json.loads(folder.summary.read_text())["reason"] == "finished"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_drops_the_reporter_and_not_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(tmp_path)
    full = Path("/dev/full").open("w")  # noqa: SIM115 (the console's close is what fails)
    console = ConsoleReporter(every=1, console=Console(file=full, width=100))
    tell(fan_out.FanOut([console, MetricsFile(folder.metrics, first_step=0)]), tmp_path)
    errors = capsys.readouterr().err.splitlines()
    assert errors == ["the terminal stops reporting, training goes on: [Errno 28] No space left on device"]
    assert len(lines(folder.metrics, "step_done")) == TOTAL
    with pytest.raises(OSError, match="No space left"):
        full.close()


def test_a_run_goes_on_when_its_output_is_no_longer_read(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    reading, writing = os.pipe()
    os.close(reading)  # as `| head` does in the end
    done = subprocess.run(
        [sys.executable, "-m", "helpers.report_events", str(folder.path)],
        cwd=Path(__file__).parent,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    os.close(writing)
    assert done.stderr.count("the terminal stops reporting, training goes on") == 1
    assert len(lines(folder.metrics, "step_done")) == TOTAL
    assert json.loads(folder.summary.read_text())["reason"] == "finished"


def test_importing_the_package_loads_neither_tensorboard_nor_torch() -> None:
    script = "import sys, macft.report.sinks.fan_out; print({'tensorboard', 'tensorflow', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "set()"
