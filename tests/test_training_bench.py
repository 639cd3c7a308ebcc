"""`macft bench --training`: both sides are measured, what can't be is a line, the file names nobody, plans use it."""

from __future__ import annotations

import getpass
import json
import os
import platform
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.execution import execution_with
from macft.device import training_speed
from macft.device.chips import known_chips
from macft.device.kind import Device
from macft.model.load import load_tokenizer
from macft.model.settings import ModelConfig
from macft.planner.speed import MAC_EFFICIENCY, chip_speed, own_speed
from macft.training_bench.cases import CASES, Case, find_cases, plan_case
from macft.training_bench.command import Wanted, bench_training
from macft.training_bench.random_weights import config_of
from macft.training_bench.rows import random_rows
from macft.training_bench.sides import Training
from macft.training_bench.turns import RunFailed, run_side

TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
HUGE = {**TINY, "hidden_size": 65536, "intermediate_size": 262144, "num_hidden_layers": 200}
KNOWN_KEYS = {
    *("format", "chip", "memory_gb", "device", "system", "python", "macft", "mlx", "mlx_lm", "rounds", "cases"),
    *("case", "model", "rows", "rows_per_step", "bits", "dtype", "steps_timed", "status", "operations_per_second"),
    *("thermal_state", "parameters", "tokens_per_step", "predicted_peak_gb", "kernels", "packing", "recompute"),
    *("target_tokens_per_second", "median_step_ms", "peak_mlx_gb"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def printed(folder: Path) -> str:
    """What the command prints for a tiny model, one that no machine holds, and one that isn't known."""
    cases = [
        Case("tiny", "tiny", "sql", config=TINY),
        Case("huge", "huge", "sql", config=HUGE),
        Case("odd", "odd", "sql", config={"model_type": "no-such-model"}),
    ]
    wanted = Wanted(cases, quick=True, steps=1, out=folder / "out.json", kept_in=folder)
    with pytest.MonkeyPatch.context() as patch, (folder / "printed.txt").open("w") as file:
        patch.setenv("COLUMNS", "120")
        patch.setattr(sys, "stdout", file)
        assert bench_training(wanted) == 0
    return (folder / "printed.txt").read_text()


@pytest.mark.slow
def test_both_sides_are_measured_and_what_can_not_be_is_one_line(printed: str, folder: Path) -> None:
    (line,) = [line for line in printed.splitlines() if line.split()[:1] == ["tiny"]]
    assert len(line.split()) == 10
    assert "-" not in line.split()
    assert "\nhuge: needs about " in printed
    assert "\nodd: odd is not the configuration of a model that mlx-lm knows" in printed
    tiny, huge, odd = json.loads((folder / "out.json").read_text())["cases"]
    for side in ("macft", "mlx_lm"):
        assert all(len(values) == 1 and values[0] > 0 for values in tiny[side].values())
    assert (tiny["status"], huge["status"], odd["status"]) == ("measured", "left out", "left out")


@pytest.mark.slow
def test_the_file_names_nobody(printed: str, folder: Path) -> None:
    assert printed
    report = json.loads((folder / "out.json").read_text())
    texts: list[str] = []

    def visit(value: Any) -> None:
        if isinstance(value, dict):
            assert set(value) <= KNOWN_KEYS
            value = list(value.values())
        if isinstance(value, list):
            for each in value:
                visit(each)
        if isinstance(value, str):
            texts.append(value)

    visit(report)
    addresses = [item.address for items in psutil.net_if_addrs().values() for item in items]
    for private in (getpass.getuser(), platform.node(), str(Path.home()), *addresses):
        assert private not in texts
    assert not [text for text in texts if "/" in text or "@" in text or "\\" in text or len(text) > 60]
    assert report["chip"]


@pytest.mark.slow
def test_a_plan_of_a_like_model_takes_the_measured_speed(printed: str, folder: Path) -> None:
    assert printed
    (case, *_) = json.loads((folder / "out.json").read_text())["cases"]
    found = training_speed.nearest(Device.default().kind, 1e12, None, folder)
    assert found is not None
    assert (found.case, found.speed) == ("tiny", case["operations_per_second"])
    assert found.work == pytest.approx(case["parameters"] * case["tokens_per_step"])
    assert training_speed.nearest("other", 1e12, None, folder) is None


@pytest.mark.slow
def test_ctrl_c_ends_it_at_once_with_what_is_done(tmp_path: Path) -> None:
    """The signal comes when the first run's process is there; that process ends, too."""
    interrupted: list[psutil.Process] = []

    def interrupt() -> None:
        end = time.monotonic() + 60
        while not interrupted and time.monotonic() < end:
            for child in psutil.Process().children():
                with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
                    interrupted.extend([child] if "training_bench" in " ".join(child.cmdline()) else [])
            time.sleep(0.02)
        if interrupted:  # else nobody waits for the signal
            os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    try:
        status = bench_training(
            Wanted([Case("tiny", "tiny", "sql", config=TINY)], quick=True, out=tmp_path / "out.json", kept_in=tmp_path)
        )
    finally:
        watcher.join()
    assert status == 130
    (case,) = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert case["status"] == "stopped"
    assert interrupted
    _, alive = psutil.wait_procs(interrupted, timeout=60)  # one that was just started ends for want of an order
    assert not alive
    assert not (tmp_path / "training-speed.json").exists()


def test_a_run_that_fails_says_why_in_its_last_line() -> None:
    order: Any = {}
    with pytest.raises(RunFailed, match=r"^no memory$"):
        run_side(order, [sys.executable, "-c", "import sys; sys.stdin.read(); sys.exit('first\\nno memory')"])


def test_the_cases_are_those_of_real_models(bundled_model: Path) -> None:
    assert bundled_model.exists()
    assert {case.name for case in CASES} >= {"1B-sql", "8B-sql", "1B-mixed", "8B-mixed", "8B-long", "8B-4bit-long"}
    assert find_cases([]) == list(CASES)
    assert [case.name for case in find_cases(["8B-long", "135M-sql"])] == ["135M-sql", "8B-long"]
    assert {len(case.model_config) > 5 for case in CASES} == {True}
    assert config_of("Meta-Llama-3.1-8B")["hidden_size"] == 4096


def test_rows_without_a_tokenizer_are_as_long() -> None:
    sql, mixed = random_rows("sql", 200), random_rows("mixed", 200)
    assert {row.tokens[:12].tobytes() for row in sql} == {sql[0].tokens[:12].tobytes()}
    assert len({row.tokens[12:20].tobytes() for row in sql}) == 200
    assert {37 <= row.prompt_length <= 59 and 9 <= row.target_tokens <= 26 for row in sql} == {True}
    assert 55 < sum(len(row.tokens) for row in sql) / 200 < 61
    assert {16 <= len(row.tokens) <= 384 and row.prompt_length == 0 for row in mixed} == {True}


def test_a_long_case_needs_more_than_a_short_one(bundled_model: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(), bundled_model)
    config = {**TINY, "vocab_size": 64, "hidden_size": 256, "intermediate_size": 1024}
    sql, long = (
        plan_case(Case("tiny", "tiny", rows, config=config), Training(rows, 2, 1), tokenizer)
        for rows in ("sql", "long")
    )
    assert (sql.refusal, long.refusal) == (None, None)
    assert sql.shape.parameters == long.shape.parameters
    assert sql.peak < long.peak
    assert sql.mlx_lm_peak < long.mlx_lm_peak
    # 2 operations a parameter and token forward and 2 back, and those of attention and of the adapter.
    assert 3 < sql.operations / sql.shape.parameters / sql.tokens < 5
    assert long.operations / long.tokens > 1.05 * sql.operations / sql.tokens
    assert 2000 <= long.tokens <= 2040


def test_speeds_of_one_machine_are_kept_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def case(name: str, parameters: float, bits: int | None, speed: float | None) -> dict[str, Any]:
        return {
            "case": name,
            "parameters": parameters,
            "tokens_per_step": 100,
            "bits": bits,
            "operations_per_second": speed,
        }

    kind, float32 = Device.default().kind, execution_with("mlx")
    report = {"format": 1, "chip": "M2", "device": kind, "memory_gb": 16}
    training_speed.keep(
        {**report, "cases": [case("1B-sql", 1e9, None, 2e12), case("8B-sql", 8e9, None, 3e12)]}, tmp_path
    )
    training_speed.keep({**report, "cases": [case("1B-sql", 1e9, None, 4e12), case("8B-4bit", 8e9, 4, 1e12)]}, tmp_path)
    training_speed.keep({**report, "cases": [case("8B-long", 8e9, None, None)]}, tmp_path)

    def speed(parameters: float, bits: int | None) -> float | None:
        found = training_speed.nearest(kind, parameters * 100, bits, tmp_path)
        return found and found.speed

    assert [speed(*model) for model in ((1e8, None), (2e10, None), (1e8, 8))] == [4e12, 3e12, 1e12]
    (tmp_path / "macft").mkdir()
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / name)
    assert "matrix product" in own_speed(1e11, float32).origin
    (tmp_path / "training-speed.json").rename(tmp_path / "macft" / "training-speed.json")
    assert own_speed(1e11, float32).operations_per_second == 4e12
    assert own_speed(1e11, float32).origin == "measured by macft bench --training (1B-sql)"
    training_speed.keep({**report, "chip": "M4", "cases": [case("8B-sql", 8e9, None, 9e12)]}, tmp_path / "macft")
    assert [each.speed for each in training_speed.stored(device=kind)] == [9e12]
    for content in ("", "[]", "{}", '{"device": "%s", "cases": [1, {"parameters": "x"}]}' % kind, "[" * 100_000):  # noqa: UP031
        (tmp_path / "macft" / "training-speed.json").write_text(content)
        assert training_speed.stored(device=kind) == []


def test_matrix_units_count_for_16_bits_only() -> None:
    chips = known_chips()
    assert chip_speed(chips["M4"], "bfloat16") == pytest.approx(4.6e12 * MAC_EFFICIENCY)
    assert chip_speed(chips["M5 Max"], "bfloat16") > 1.5 * chip_speed(chips["M4 Max"], "bfloat16")
    assert chip_speed(chips["M5 Max"], "float32") == pytest.approx(19.6e12 * MAC_EFFICIENCY)
    assert [name for name, chip in chips.items() if chip.matrix_tflops] == ["M5", "M5 Pro", "M5 Max"]
