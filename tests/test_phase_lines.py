"""No phase is silent: what it is called and how far it has come, also where there is no terminal."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from queue import Queue

import pytest
from rich.console import Console

from helpers.report_events import step
from helpers.waiting import wait_until
from macft.data.formats import Place, RawRow
from macft.data.load import rows_to_tokenize, tokenize_all
from macft.data.settings import DatasetConfig, SourceConfig
from macft.model.load import load_tokenizer
from macft.model.settings import ModelConfig
from macft.report.events import Evaluated, PhaseProgress
from macft.report.phase_lines import PhaseLines
from macft.report.shown_phases import ShownPhases
from macft.report.sinks.console import ConsoleReporter

WAIT = 60


def test_a_phase_has_a_name_a_count_and_then_its_time() -> None:
    lines: Queue[str] = Queue()
    with PhaseLines(lines.put, first=0, every=0.01) as phases:
        phases.begin("tokenizing", 20_000, unit="rows")
        assert lines.get(timeout=WAIT) == "tokenizing: 0 of 20,000 rows ..."
        phases.advance(1_500)
        counted = re.compile(r"tokenizing: 1,500 of 20,000 rows  0:\d\d")
        wait_until(lambda: counted.fullmatch(lines.get(timeout=WAIT)) is not None)
        phases.begin("loading the model x")
        wait_until(lambda: lines.get(timeout=WAIT) == "loading the model x ...")


def test_short_phases_and_ended_ones_say_nothing() -> None:
    lines: Queue[str] = Queue()
    with PhaseLines(lines.put, first=0, every=0.01) as phases:
        phases.begin("first")
        lines.get(timeout=WAIT)
        phases.end()
        told = lines.qsize()
        phases.begin("downloads with a bar of its own", once=True)
        wait_until(lambda: lines.qsize() > told)
        assert lines.qsize() == told + 1
        phases.close()
        phases.close()
        phases.begin("after it was closed")
        wait_until(lambda: lines.qsize() > told + 1)
    assert "downloads with a bar of its own ..." in lines.queue
    assert sum("downloads" in line for line in lines.queue) == 1
    slow: list[str] = []
    with PhaseLines(slow.append, first=3600) as phases:
        phases.begin("short")
    assert slow == []


def test_an_output_that_is_no_longer_read_disturbs_nothing() -> None:
    asked: Queue[str] = Queue()

    def show(line: str) -> None:
        asked.put(line)
        raise BrokenPipeError

    with PhaseLines(show, first=0, every=0.01) as phases:
        phases.begin("validation", 4)
        asked.get(timeout=WAIT)
        asked.get(timeout=WAIT)


def test_every_row_counts_also_those_that_are_dropped(bundled_model: Path) -> None:
    rows = [{"prompt": "what is 2", "completion": "two" * size} for size in range(5)]
    raw = [RawRow(row, Place("x", "train", number)) for number, row in enumerate(rows, 1)]
    sources = [(SourceConfig(path="x"), {"train": raw, "valid": raw[:2], "test": raw[:3]})]
    tokenizer = load_tokenizer(ModelConfig(), bundled_model)
    for need_test, total in ((False, 7), (True, 10)):
        done: list[int] = []
        config = DatasetConfig(path="x", max_seq_length=40)
        tokenize_all(sources, config, tokenizer, need_test=need_test, progress=done.append)
        assert rows_to_tokenize(sources, need_test=need_test) == total
        assert done == list(range(1, total + 1))


def test_a_log_shows_phases_with_their_count() -> None:
    written = io.StringIO()
    console = ConsoleReporter(every=10, console=Console(file=written, width=100))
    console.handle(PhaseProgress("validation", 0, 400))
    console.handle(PhaseProgress("validation", 176, 400))
    wait_until(lambda: "· validation: 176 of 400 ..." in written.getvalue())
    console.handle(Evaluated(0, 2.5, 100, 1.0, is_best=True))
    console.close()
    assert written.getvalue().splitlines()[-1].endswith("validation loss 2.500  before training")


@pytest.mark.parametrize(
    ("seconds", "printed"), [(1.0, [1, 12]), (20.0, [1, 3, 5, 7, 9, 11, 12]), (90.0, [*range(1, 13)])]
)
def test_slow_steps_are_printed_more_often(seconds: float, printed: list[int]) -> None:
    written = io.StringIO()
    console = ConsoleReporter(every=100, console=Console(file=written, width=200))
    for number in range(1, 13):
        console.handle(replace(step(number), seconds=seconds, total_steps=12))
    console.close()
    lines = [line for line in written.getvalue().splitlines() if "tokens/s" in line]
    assert [int(line.split("/")[0].split()[-1]) for line in lines] == printed


def test_a_command_tells_its_phases_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []

    def is_told() -> bool:
        told.append(capsys.readouterr().err)
        return "".join(told).endswith("\n")  # which is written by itself

    with ShownPhases() as phases:
        phases("reading the dataset", 0, 0)
        phases("tokenizing", 1_500, 20_000)
        wait_until(is_told)
    assert "".join(told) == "· tokenizing: 1,500 of 20,000 ...\n"


@pytest.mark.parametrize("width", [60, 200])
def test_a_command_shows_its_phases_at_a_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    for name, value in (("COLUMNS", str(width)), ("TERM", "xterm-256color"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    with ShownPhases() as phases:
        phases.begin("loading the model " + "long-name/" * 8)
        phases("tokenizing", 1_500, 20_000)
        wait_until(lambda: "1,500/20,000" in terminal.getvalue())
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).replace("\r", "\n")
    assert re.search(r"tokenizing .* 1,500/20,000 \d:\d\d:\d\d", shown)
    assert max(map(len, shown.splitlines())) <= width
