"""The plan: shapes from config.json, predicted memory, what fits, the table of chips, and refusals before loading."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_map
from rich.console import Console

import macft.plan
from harness.execution import execution_with
from harness.families import configuration, new_model
from harness.runs import Finished, environment, events, train, write_jsonl
from harness.tiny_model import TINY_CONFIG, make_tiny_model
from helpers.computing import gradient_computer, settled_memory
from helpers.models import FAMILIES, MAMBA, SMALL, make_from, make_model
from helpers.runs_here import refused
from macft.cli.run_command import run_command
from macft.config.command_line import prepare
from macft.config.execution import execution_for
from macft.config.schema import TrainConfig
from macft.data.batch import Batch, collate, micro_batches, pack, pad_pack_to_bucket, pad_to_bucket
from macft.data.formats import Row
from macft.data.order import RowOrder
from macft.device.chips import chip_of_brand, find_mac, find_macs, known_chips
from macft.device.kind import METAL, Device
from macft.errors import ConfigError, ModelError
from macft.model.adapters.adapt import adapt
from macft.model.adapters.settings import AdapterConfig
from macft.model.backends.choose import can_pack
from macft.model.execution import Execution, WeightFormat, resolve
from macft.model.load import load
from macft.model.settings import ModelConfig
from macft.model.shape import ModelShape, read_shape, shape_of
from macft.network.link_kinds import LINK_KINDS, find_links
from macft.parallel.shares import DataShard, rows_of_shard
from macft.planner.known_models import known_models
from macft.planner.memory import ComputeShape, predict, trained_part
from macft.planner.memory_planner import MemoryPlanner, batch_overrides
from macft.planner.packing import COSTS, choose_packing
from macft.planner.plan.longest_row import find_longest_rows
from macft.planner.plan.run_plan import RunPlan, plan_run
from macft.planner.plan.table import show, show_longest_rows
from macft.planner.speed import step_cost
from macft.planner.workload import DeviceBatchShape, StepRows, steps_of, unlike_rows
from macft.topology.settings import parse_budget
from macft.training.batch_layout import BatchLayout
from macft.training.targets import target_positions
from macft.training_bench.cases import Case

FLOAT32 = WeightFormat("float32")
CPU = Device("cpu", openblas=True)
LLAMA_70B = "mlx-community/Meta-Llama-3.1-70B-Instruct-4bit"
LLAMA_8B = "mlx-community/Meta-Llama-3.1-8B-Instruct-4bit"
# The logits, which take most of the memory, are those of a model's whole vocabulary.
WIDE_CONFIG = {**TINY_CONFIG, "vocab_size": 49152}


@pytest.fixture(scope="module")
def wide_model_folder(tmp_path_factory: pytest.TempPathFactory, bundled_model: Path) -> Path:
    """The tiny model with the bundled one's whole vocabulary."""
    return make_tiny_model(tmp_path_factory.mktemp("wide-model"), bundled_model, WIDE_CONFIG)


def tiny_shape() -> ModelShape:
    return shape_of(dict(WIDE_CONFIG), "config.json")


def padded_execution(**changes: Any) -> Execution:
    """Float32, padded, not compiled, with MLX's operations on a CPU."""
    return Execution(device="cpu", kernels="mlx", dtype="float32", max_logits=2**21, **changes)


def free_execution(**changes: Any) -> Execution:
    """The same, of which the planner chooses what is recomputed."""
    return padded_execution(recompute_choices=("none", "cheap", "blocks"), **changes)


def make_planner(rows: int = 8, length: int = 257, execution: Execution | None = None) -> MemoryPlanner:
    steps = [unlike_rows(rows, length, length - 1)]
    execution = execution or padded_execution()
    return MemoryPlanner(tiny_shape(), execution, AdapterConfig(), "adamw", steps, validation_rows=0)


def test_packs_are_chosen_where_they_take_less_time() -> None:
    """By MLX's operations; the CPU's kernels always gain, and what the user asks for is done."""
    alike = [unlike_rows(4, 257, 64)]
    mixed = [StepRows([Row(np.arange(n, dtype=np.int32), 0) for n in (20, 40, 90, 300)], np.arange(4))]
    begun = np.arange(200, dtype=np.int32)
    shared = [StepRows([Row(np.append(begun, [n] * 30).astype(np.int32), 228) for n in range(4)], np.arange(4))]
    few = [StepRows([Row(row.tokens[:30], 2) for row in shared[0].rows], np.arange(4))]

    def packs(steps: list[StepRows], model: str = "Meta-Llama-3.1-8B", **others: Any) -> bool:
        execution = replace(execution_with("mlx", packing=True), shared_prefixes=True, **others)
        shape = shape_of(Case("", model, "sql").model_config, model)
        planner = replace(make_planner(execution=execution), shape=shape, steps=steps)
        return choose_packing(planner)[0].packing

    assert not packs(alike, device="metal")
    assert packs(mixed, device="metal")
    assert packs(shared, device="metal")
    assert packs(shared, device="cuda")
    assert packs(few, device="metal")
    assert not packs(few, "Llama-3.2-1B", device="cuda")  # handing over the kernels takes most of the time
    assert not packs([mixed[0], *alike * 3], device="cuda")  # faster, but not by as much as the prediction may be wrong
    assert packs(alike, requires_packing=True)
    assert packs(alike, kernels="cpu")
    padded, notes = choose_packing(replace(make_planner(execution=execution_with("mlx", packing=True)), steps=alike))
    assert padded.shared_prefixes is False
    assert notes == ["training.packing=auto: rows are padded; by count, packs would take 1.00 of the time"]


# Of an H100 with the code of 1983839, whose packs were laid out as rows: operations in 1e12, kernels counted in its
# compiled graphs, and the median step in ms (benchmarks/training.md), each of packs and of padded rows.
H100 = {
    "1B, sql": ((0.97, 1.34), (2674, 2130), (59, 36)),
    "8B, sql": ((4.78, 6.76), (3186, 2386), (41, 44)),
    "1B, mixed": ((2.73, 4.83), (2730, 2214), (84, 81)),
    "8B, mixed": ((12.4, 22.6), (3242, 2470), (111, 98)),
    "8B, long": ((49.5, 49.5), (3400, 2600), (158, 152)),
}


def test_the_cost_model_would_have_padded_what_an_h100_padded_faster() -> None:
    """Or as fast within 7%; and its margin covers what it was wrong by."""
    costs = COSTS["cuda"]
    for operations, kernels, measured in H100.values():
        packs, padded = (costs.seconds(1e12 * each, count) for each, count in zip(operations, kernels, strict=True))
        assert packs > costs.pays * padded
        assert measured[0] > 0.93 * measured[1]
        assert measured[0] / measured[1] < packs / padded / costs.pays


@pytest.mark.parametrize(
    "adapter",
    [
        AdapterConfig(),
        AdapterConfig(type="dora", rank=4),
        AdapterConfig(num_layers=1, targets=["q_proj", "self_attn.v_proj"]),
        AdapterConfig(type="full", layers=[0]),
        AdapterConfig(type="full", num_layers=1, targets=["down_proj"]),
    ],
)
def test_trainable_parameters_are_those_that_the_model_gets(tiny_model_folder: Path, adapter: AdapterConfig) -> None:
    config = ModelConfig(path=str(tiny_model_folder))
    made = adapt(load(config, tiny_model_folder).model, adapter, seed=0)
    shape = read_shape(tiny_model_folder)
    assert shape.parameters == made.total_parameters
    assert trained_part(shape, adapter).parameters == made.trainable_parameters


@pytest.mark.parametrize("family", ["deepseek", "llama4", "qwen3_moe"])
@pytest.mark.parametrize(
    "adapter",
    [
        AdapterConfig(),
        AdapterConfig(rank=3, layers=[0, 1], targets=["gate_proj", "up_proj", "down_proj"]),
        AdapterConfig(type="dora", targets=["q_proj", "v_proj"]),
        AdapterConfig(type="full", num_layers=1),
        AdapterConfig(type="full", targets=["down_proj"]),
    ],
)
def test_trainable_parameters_of_mixtures_too(family: str, adapter: AdapterConfig) -> None:
    """Experts, and blocks that differ."""
    made = adapt(new_model(configuration(family)), adapter, seed=0)
    planned = trained_part(shape_of(configuration(family), family), adapter)
    assert planned.parameters == made.trainable_parameters
    if adapter == AdapterConfig():
        experts = (4 * (64 + 32) * 8) * 3
        assert planned.parameters > experts


@pytest.mark.parametrize("content", ["", "[]", '{"model_type": "llama"}', '{"model_type": "no-such-thing"}', "\x00"])
def test_a_config_that_is_none_is_one_clear_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_shape(tmp_path)


def test_quantised_weights_are_counted_as_such() -> None:
    config = {**known_models()[LLAMA_8B], "vocab_size": 128256}
    shape = shape_of(config, LLAMA_8B)
    assert shape.parameters == 8_030_261_248
    # mlx-community's checkpoint of it has 4.52 GB.
    assert shape.weight_bytes(shape.checkpoint) == pytest.approx(4.52e9, rel=0.01)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 32),
    tokens=st.integers(2, 2048),
    recompute=st.sampled_from(["none", "cheap", "blocks"]),
    kind=st.sampled_from(["lora", "dora", "full"]),
    kernels=st.sampled_from(["mlx", "cpu"]),
)
def test_memory_grows_with_rows_and_length(rows: int, tokens: int, recompute: str, kind: str, kernels: str) -> None:
    shape, adapter = tiny_shape(), AdapterConfig(type=kind)
    execution = replace(padded_execution(recompute=recompute), kernels=kernels)

    def peak(rows: int, tokens: int) -> float:
        work = ComputeShape(rows, tokens, rows * tokens, rows * tokens)
        parts = predict(shape, execution, adapter, "adamw", work)
        assert min(parts.weights, parts.activations, parts.gradients) > 0
        assert min(parts.logits, parts.overhead, parts.adapter) >= 0
        assert parts.peak >= parts.weights
        return parts.peak

    assert peak(rows, tokens) <= peak(rows + 1, tokens)
    assert peak(rows, tokens) <= peak(rows, tokens + 16)


def test_chunked_logits_and_checkpointing_save_memory() -> None:
    planner = make_planner(rows=8, length=513)
    whole = planner.parts(padded_execution(loss_chunk=2048)).peak
    assert planner.parts(padded_execution(loss_chunk=64)).peak < 0.8 * whole
    deep = replace(planner, shape=shape_of({**WIDE_CONFIG, "num_hidden_layers": 24}, "config.json"))
    plain = padded_execution(loss_chunk=64)
    assert deep.parts(plain.with_batch(None, "blocks")).peak < 0.5 * deep.parts(plain).peak


@settings(deadline=None, max_examples=40)
@given(share=st.floats(0.01, 1.5), rows=st.integers(1, 16), asked=st.none() | st.integers(1, 16))
def test_auto_uses_the_memory_but_never_more(share: float, rows: int, asked: int | None) -> None:
    execution = free_execution().with_batch(asked, "none")
    planner = make_planner(rows=rows, execution=execution)
    budget = share * planner.parts().peak
    best = planner.best(budget)
    if best is None:
        assert planner.parts(execution.with_batch(1, "blocks")).peak > budget
        assert planner.refusal(budget, auto=True)
        return
    assert planner.parts(best).peak <= budget
    assert planner.refusal(budget, auto=True) is None
    assert best.micro_batch_size is not None
    assert best.evaluation_rows == best.micro_batch_size <= min(rows, asked or rows)
    if share >= 1:
        assert best.micro_batch_size == min(rows, asked or rows)
        assert best.recompute in ("none", "cheap")


@pytest.mark.parametrize("auto", [False, True])
def test_recomputation_follows_the_budget(auto: bool) -> None:
    """None where half of the budget is enough, then what is cheap, then blocks; never what was not asked for."""
    planner = make_planner(rows=8, length=513, execution=free_execution(loss_chunk=64).with_batch(8, "none"))
    planner = replace(planner, shape=shape_of({**WIDE_CONFIG, "num_hidden_layers": 24}, "config.json"))
    peaks = {one: planner.parts(planner.execution.with_batch(8, one)).peak for one in ("none", "cheap", "blocks")}
    assert peaks["blocks"] < peaks["cheap"] < peaks["none"]

    def chosen(budget: float, planner: MemoryPlanner = planner) -> str | None:
        best = planner.best(budget, sizes=auto)
        return best and best.recompute

    assert chosen(2.01 * peaks["none"]) == "none"
    assert chosen(1.99 * peaks["none"]) == "cheap"
    assert chosen(1.01 * peaks["cheap"]) == "cheap"
    if not auto:
        assert chosen(0.99 * peaks["cheap"]) == "blocks"
        assert chosen(0.99 * peaks["blocks"]) is None
    asked = replace(planner, execution=replace(planner.execution, recompute_choices=()))
    assert chosen(1.01 * peaks["none"], asked) == "none"
    if not auto:
        assert chosen(0.99 * peaks["none"], asked) is None
        assert "training.recompute=" in str(asked.refusal(0.99 * peaks["none"], auto=False))


def test_a_refusal_names_the_nearest_settings_that_fit() -> None:
    planner = make_planner()
    budget = planner.parts(padded_execution().with_batch(2, "none")).peak
    nearest = planner.best(budget, asked=False)
    assert nearest is not None
    assert f"{batch_overrides(nearest)} would fit" in str(planner.refusal(budget, auto=False))
    smallest = planner.parts(padded_execution().with_batch(1, "blocks")).peak
    assert "dataset.max_seq_length=" in str(planner.refusal(smallest * 0.7, auto=True))
    assert "topology.placement=stream reads" in str(planner.refusal(1e6, auto=True))


def sizes_by_hand(batch: Batch, execution: Execution) -> list[tuple[int, int, int, int]]:
    """(rows, length, tokens, targets) of what the trainer computes at once."""
    if execution.packing:
        packs = pack(batch, execution.pack_tokens, shared=execution.shared_prefixes)
        packs = [pad_pack_to_bucket(item) for item in packs] if execution.compiled else packs
        return [(*item.paths.shape, item.inputs.shape[1], len(item.targets)) for item in packs]
    batch = pad_to_bucket(batch) if execution.compiled else batch
    rows, length = batch.tokens[:, :-1].shape
    return [(rows, length, rows * length, len(target_positions(batch, coarse=execution.compiled)[0]))]


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    data=st.lists(st.tuples(st.integers(0, 2), st.integers(2, 300), st.integers(0, 300)), min_size=1, max_size=24),
    size=st.none() | st.integers(1, 8),
    shares=st.lists(st.floats(0.1, 4), min_size=1, max_size=4),
    device=st.sampled_from([CPU, METAL]),
    packing=st.sampled_from(["true", "false"]),
    compile=st.sampled_from(["true", "false"]),
    dropout=st.booleans(),
)
def test_the_plan_counts_what_the_trainer_computes(
    data: list[tuple[int, int, int]],
    size: int | None,
    shares: list[float],
    device: Device,
    packing: str,
    compile: str,
    dropout: bool,
) -> None:
    """Rows that are one of three texts up to some place, masked up to another."""
    execution = resolve(
        ModelConfig(), FLOAT32, device, packing=packing, compile=compile, dropout=dropout, micro_batch_size=size
    )
    rows = [Row(np.arange(start, n + start, dtype=np.int32), prompt) for start, n, prompt in data]
    order = RowOrder([len(rows)], [1.0], batch_size=len(rows), seed=3)
    (step,) = steps_of(rows, order, 1)
    ids = order.rows(0)
    for rank in range(len(shares)):
        shard = DataShard(rank, len(shares), tuple(shares))
        own = rows_of_shard(shard, [rows[i].tokens for i in ids], shared=execution.shared_prefixes)
        batches = micro_batches([rows[ids[i]] for i in own], ids[own], size)
        expected = [sizes for batch in batches for sizes in sizes_by_hand(batch, execution)]
        part = step.of_shard(shard, shared=execution.shared_prefixes)
        planned = MemoryPlanner(tiny_shape(), execution, AdapterConfig(), "adamw", [part], 0).step_batches(size)
        assert [(one.rows, one.length, one.tokens, one.targets) for one in planned[0]] == expected


def test_a_token_is_counted_with_those_it_sees() -> None:
    tokens = [[1, 2, 3, 9], [1, 2, 4, 5, 9]]
    step = StepRows([Row(np.array(row, np.int32), 0) for row in tokens], np.arange(2))
    shared, packed, padded = (
        BatchLayout.from_execution(padded_execution(**changes))
        for changes in ({"packing": True, "shared_prefixes": True}, {"packing": True}, {})
    )
    assert step.device_batches(None, shared) == [DeviceBatchShape(2, 4, 5, 7, 1 + 2 + 3 + 3 + 4)]
    assert step.device_batches(None, packed) == [DeviceBatchShape(2, 4, 7, 7, 6 + 10)]
    assert step.device_batches(None, padded) == [DeviceBatchShape(2, 16, 32, 32, 2 * 136)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_knows_which_models_pack(family: str) -> None:
    shape = shape_of({**SMALL, "model_type": family, **FAMILIES[family]}, family)
    assert shape.packs == can_pack(make_model(family), padded_execution(packing=True))


def test_what_rows_share_needs_no_memory() -> None:
    """Nor time; and where nothing is shared, a pack needs what the rows padded to their length do."""
    same = [Row(np.append(np.arange(200), [300 + i] * 57).astype(np.int32), 220) for i in range(8)]
    alike, unlike = StepRows(same, np.arange(8)), unlike_rows(8, 257, 37)
    packed = padded_execution(packing=True, shared_prefixes=True)
    execution = replace(packed, kernels="cpu")
    few, many = (replace(make_planner(execution=execution), steps=[step]) for step in (alike, unlike))
    assert few.parts().activations == pytest.approx((200 + 8 * 56) / (8 * 256) * many.parts().activations)
    head = 4 * tiny_shape().embedding_parameters * 8 * 37
    assert step_cost(few, execution).operations - head < 0.4 * (step_cost(many, execution).operations - head)
    assert step_cost(few, execution).tokens == step_cost(many, execution).tokens == 8 * 257
    whole = replace(many, execution=packed)
    assert whole.parts().activations == replace(many, execution=packed.padded()).parts().activations


def test_chips_are_found_by_the_names_people_use() -> None:
    assert find_mac("M1 Air 8GB").name == "M1 8GB"
    assert find_mac("m4 max 64gb").chip is known_chips()["M4 Max"]
    assert find_mac("M2 Pro").memory == 16
    assert find_mac("M1 Air 8GB").usable_bytes == pytest.approx(0.67 * 8 * 2**30)
    for mac in known_chips().values():
        assert mac.source
        assert list(mac.memory) == sorted(mac.memory)


@pytest.mark.parametrize(
    ("text", "message"),
    [("M9 Max", "not a known chip"), ("M1 12GB", "8, 16 GB, not 12"), ("", "not a known chip"), ("8GB", "not a known")],
)
def test_unknown_macs_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_mac(text)


@given(st.text(max_size=12))
def test_budgets_are_sizes_or_fractions(text: str) -> None:
    try:
        assert parse_budget(text, 100.0) >= 0
    except ValueError:
        return


def test_budget_units() -> None:
    assert parse_budget("0.5", 200.0) == 100.0
    assert parse_budget("12GB", 1.0) == 12e9
    assert parse_budget("1.5 gib", 1.0) == 1.5 * 2**30


Planned = Callable[..., Finished]


@pytest.fixture
def planned(capsys: pytest.CaptureFixture[str]) -> Planned:
    """Runs ``macft plan`` with some words, in this process."""

    def plan(*words: str) -> Finished:
        status = run_command(macft.plan.main, words)
        return Finished(status, *capsys.readouterr())

    return plan


@pytest.mark.slow
def test_the_command_plans_for_macs_one_does_not_own(bundled_model: Path) -> None:
    words = ["+recipe=llama-lora", "model=llama-3.1-8b", "--chips", "M1 Air 8GB,M4 Max 64GB"]
    done = subprocess.run(
        [sys.executable, "-m", "macft.plan", *words],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "M1 8GB" in done.stdout
    assert "M4 Max 64GB" in done.stdout
    assert "tokens/s" in done.stdout
    assert bundled_model.exists()


UNEQUAL = ["+recipe=llama-lora", f"model={LLAMA_70B}", "training.batch_size=16", "training.packing=false"]


def plan_for(macs: list[str], *words: str) -> RunPlan:
    config = prepare([*UNEQUAL, f"plan.chips={macs}", *words]).job
    assert config is not None
    return plan_run(config)


@pytest.mark.slow
def test_a_plan_can_be_read_at_80_columns_and_at_60(bundled_model: Path) -> None:
    """Every number is whole, of a model that no Mac holds, cut over four unequal ones."""
    assert bundled_model.exists()
    plan = plan_for(["M2 Max 32GB", "M4 Pro 24GB", "M1 Max 32GB", "M2 Pro 16GB"], "plan.link=thunderbolt4")
    text = io.StringIO()
    show(plan, Console(file=text, width=80, highlight=False))
    assert all(len(line.rstrip()) <= 80 for line in text.getvalue().splitlines())
    assert "\u2026" not in text.getvalue()
    pipeline = plan.placements["pipeline"]
    for stages in pipeline.layout.pipelines:
        for stage in stages:
            node = plan.nodes[stage.rank]
            peak = plan.stages.get(stage.rank, node.parts).peak
            assert f" {stage.first}-{stage.end - 1} " in text.getvalue()
            assert f" {peak / 1e9:.2f} " in text.getvalue()
            assert peak <= node.budget
    for decision in plan.placements.values():
        assert f" {decision.seconds:.2f} " in text.getvalue()
    assert "Thunderbolt 4 (plan.link)" in text.getvalue()
    narrow = io.StringIO()
    show(plan, Console(file=narrow, width=60, highlight=False))
    assert all(len(line.rstrip()) <= 60 for line in narrow.getvalue().splitlines())
    words = " ".join(narrow.getvalue().split())
    assert "\u2026" not in words
    for stage in (stage for stages in pipeline.layout.pipelines for stage in stages):
        node = plan.nodes[stage.rank]
        assert f"{node.name}: blocks {stage.first}-{stage.end - 1}, weights " in words
        assert f"peak {plan.stages.get(stage.rank, node.parts).peak / 1e9:.2f}, available " in words


@pytest.mark.slow
def test_a_slower_link_makes_a_step_longer_and_more_macs_make_it_shorter(bundled_model: Path) -> None:
    assert bundled_model.exists()
    fast = plan_for(["2x M2 Max 32GB"], "plan.link=thunderbolt5")
    slow = plan_for(["2x M2 Max 32GB"], "plan.link=[wifi,wifi]")
    assert [node.name for node in fast.nodes] == ["M2 Max 32GB #1", "M2 Max 32GB #2"]
    for kind, decision in fast.placements.items():
        assert decision.seconds < slow.placements[kind].seconds
    assert fast.chosen is not None
    alone = plan_for(["M2 Max 32GB"])
    assert alone.chosen == "stream"
    assert any("would hold the model in memory, as a pipeline" in line for line in alone.advice)
    assert alone.placements["stream"].seconds > fast.placements["stream"].seconds


@pytest.mark.slow
def test_settings_that_no_pipeline_is_for_have_none(bundled_model: Path) -> None:
    assert bundled_model.exists()
    assert "pipeline" not in plan_for(["2x M2 Max 32GB"], "training.sync=diloco", "training.inner_steps=16").placements


def without_phases(text: str) -> list[str]:
    """The lines of ``text`` but for those that say what a slow machine is at."""
    return [line for line in text.splitlines() if not line.startswith("· ")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--link", "carrier pigeon"], "plan.link: 'carrier pigeon' is not one of wifi, ethernet"),
        (["--link", "0MB"], "plan.link: '0MB' is not one of"),
        (["--link", "wifi,wifi,wifi", "--chips", "M1,M2"], "plan.link: 3 links for 2 Macs"),
        (["--chips", "99x M1"], "plan.chips: '99x M1': plan for 1 to 64 Macs in all"),
        (["--chips", "0x M1"], "plan.chips: '0x M1': plan for 1 to 64 Macs in all"),
    ],
)
@pytest.mark.slow
def test_wrong_links_and_counts_are_one_line(words: list[str], message: str, planned: Planned) -> None:
    wrong = planned("+recipe=llama-lora", *words)
    assert wrong.status == 2
    (line,) = without_phases(wrong.errors)
    assert line.startswith(f"error: {message}")


def test_links_have_names_or_a_speed() -> None:
    assert find_links("thunderbolt4") == [LINK_KINDS["thunderbolt4"]]
    assert [link.bandwidth for link in find_links(["1.5GB", "20 MB/s"])] == [1.5e9, 2e7]
    assert find_macs(["2x M2 Max 32GB", "M1 8GB"]) == [*[find_mac("M2 Max 32GB")] * 2, find_mac("M1 8GB")]
    assert chip_of_brand("Apple M2 Max") is known_chips()["M2 Max"]
    assert chip_of_brand("Intel(R) Xeon(R)") is None


@pytest.mark.slow
def test_the_command_says_what_does_not_fit_and_wrong_words_are_one_line(bundled_model: Path, planned: Planned) -> None:
    assert bundled_model.exists()
    large = planned(
        "+recipe=llama-lora",
        "model=mlx-community/Meta-Llama-3.1-70B-Instruct-4bit",
        "plan.chips=[M2 Pro 16GB]",
        "topology.batch=auto",
    )
    assert large.status == 0, large.errors
    assert "stream: " in large.output
    refused = planned(
        "+recipe=llama-lora",
        "model=mlx-community/Meta-Llama-3.1-70B-Instruct-4bit",
        "plan.chips=[M2 Pro 16GB]",
        "topology.placement=replicate",
    )
    assert refused.status == 1
    assert "topology.placement=stream reads them from disk" in refused.output
    wrong = planned("+recipe=llama-lora", "--chips", "M9")
    assert wrong.status == 2
    (line,) = without_phases(wrong.errors)
    assert line.startswith("error: plan.chips: 'M9' is not a known chip")


@pytest.mark.slow
def test_a_run_that_does_not_fit_is_refused_and_auto_makes_it_fit(wide_model_folder: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    rows = [{"text": " ".join(generator.choice(["red", "river", "north"], 1000))} for _ in range(8)]
    write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    words = [
        f"model={wide_model_folder}",
        f"dataset={tmp_path / 'data'}",
        "dataset.max_seq_length=1000",
        "training.packing=false",
        "training.recompute=none",
        "training.batch_size=8",
        "training.steps=1",
        "training.eval_every=0",
        "optimizer.warmup_steps=0",
        "topology.memory_budget=150MB",
    ]
    refusal = refused(*words, folder=tmp_path / "run")
    assert refusal.exit_code == 2
    assert str(refusal).startswith("topology.memory_budget: the run would need about 0.")
    assert "topology.batch=auto" in str(refusal)
    assert not events(tmp_path / "run", "run_started")
    made = train(*words, "topology.batch=auto", f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path)
    assert made.status == 0, made.errors
    assert "topology.batch=auto chose training.micro_batch_size=" in made.output
    assert max(event["peak_memory"] for event in events(tmp_path / "run", "step_done")) < 150e6
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])


MIXTURE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}
LATENT = {
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "qk_nope_head_dim": 32,
    "topk_method": "noaux_tc",
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "rope_scaling": None,
}
MEDIUM = {
    **SMALL,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "head_dim": 32,
    "vocab_size": 4096,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
WINDOW = {"query_pre_attn_scalar": 32, "sliding_window": 32, "sliding_window_pattern": 2}
GEMMA = {**MEDIUM, **WINDOW, "model_type": "gemma3_text"}
KINDS = {
    "mixture": {**MEDIUM, **MIXTURE, "model_type": "qwen3_moe"},
    "latent attention": {**MEDIUM, **LATENT, "model_type": "deepseek_v3"},
    "window": GEMMA,
    "wrapper": {"model_type": "gemma3", "vocab_size": 4096, "text_config": GEMMA},
}


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_other_kinds_are_predicted_within_15_percent(kind: str) -> None:
    """From the configuration alone, against a gradient with MLX's operations."""
    shape = shape_of(KINDS[kind], kind)
    assert shape.odd_block is not None
    execution, adapter = padded_execution(), AdapterConfig(rank=4)
    parts = predict(shape, execution, adapter, "adamw", ComputeShape(4, 160, 4 * 160, 4 * 64))
    assert parts.unknown is None
    model = make_from(KINDS[kind])
    adaptation = adapt(model, adapter, seed=0)
    assert trained_part(shape, adapter).parameters == adaptation.trainable_parameters
    tokens = np.random.default_rng(0).integers(1, 4000, (4, 161)).astype(np.int32)
    batch = collate([Row(row, prompt_length=97) for row in tokens], np.arange(4))
    with gradient_computer(model, adaptation, "mlx", max_logits=execution.max_logits) as compute:
        mx.eval(compute(0, [batch]).gradient)
        before = settled_memory()
        mx.eval(compute(0, [batch]).gradient)
        measured = mx.get_peak_memory() - before
    assert parts.activations + parts.logits == pytest.approx(measured, rel=0.15)


def test_a_large_mixture_is_predicted_without_its_weights() -> None:
    """Of 3 GB; its graph is built, and no array gets values."""
    sizes = {"hidden_size": 1024, "moe_intermediate_size": 1024, "num_experts": 128, "n_routed_experts": 128}
    shape = shape_of(KINDS["mixture"] | sizes, "config.json")
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    predict(shape, padded_execution(), AdapterConfig(rank=4), "adamw", ComputeShape(1, 32, 32, 32))
    assert shape.weight_bytes(shape.checkpoint) > 2e9
    assert mx.get_peak_memory() - before < 1e8


def test_the_longest_row_is_the_longest_that_fits() -> None:
    config = prepare([f"model={LLAMA_8B}", "plan.chips=[M4 16GB,M4 Max 64GB]", "adapter.num_layers=16"]).job
    assert config is not None
    small, large = find_longest_rows(config).nodes
    for node in (small, large):
        assert 0 < node.macft["none"] < node.macft["cheap"] < node.macft["blocks"]
        assert 0 < node.mlx_lm["none"] < node.mlx_lm["blocks"] < node.macft["blocks"]
    assert all(2 * small.macft[way] < large.macft[way] for way in small.macft)
    shape = shape_of(known_models()[LLAMA_8B], LLAMA_8B)
    execution = execution_for(config, shape, shape.checkpoint, METAL).padded()
    longer = 1.25 * small.macft["cheap"]
    peaks = [
        MemoryPlanner(shape, execution, config.adapter, "adamw", [unlike_rows(1, int(length) + 1, int(length))], 1)
        .parts(execution.with_batch(1, "cheap"))
        .peak
        for length in (small.macft["cheap"], longer)
    ]
    assert peaks[0] <= small.budget < peaks[1]


def test_the_longest_row_is_printed_with_a_line_for_each_mac() -> None:
    console = Console(file=io.StringIO(), width=100)
    config = prepare([f"model={LLAMA_70B}", "plan.chips=[M1 8GB,M4 Max 64GB]"]).job
    assert config is not None
    show_longest_rows(find_longest_rows(config), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "mlx_lm --grad-checkpoint" in text
    assert any(line.split()[:2] == ["M1", "8GB"] and "-" in line.split() for line in text.splitlines())


PORTABLE = {
    **SMALL,
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "head_dim": 32,
    "vocab_size": 512,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("dtype", "bits", "recompute", "rows", "length"),
    [
        ("float32", None, "none", 4, 64),
        ("float32", None, "cheap", 4, 64),
        ("bfloat16", None, "cheap", 1, 256),
        ("float32", 4, "cheap", 1, 512),
        ("float32", None, "blocks", 2, 128),
    ],
)
def test_the_portable_path_is_predicted_within_15_percent(
    dtype: str, bits: int | None, recompute: str, rows: int, length: int
) -> None:
    """From the configuration alone, against a gradient with MLX's operations; longer rows in benchmarks/memory.py."""
    shape, adapter = shape_of(PORTABLE, "config.json"), AdapterConfig(rank=4)
    execution = replace(padded_execution(recompute=recompute), dtype=dtype, bits=bits)
    parts = predict(shape, execution, adapter, "adamw", ComputeShape(rows, length, rows * length, rows * length))
    model = make_from(PORTABLE)
    model.update(tree_map(lambda value: value.astype(getattr(mx, dtype)), model.parameters()))
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    adaptation = adapt(model, adapter, seed=0)
    tokens = np.random.default_rng(0).integers(1, 500, (rows, length + 1)).astype(np.int32)
    batch = collate([Row(row, prompt_length=0) for row in tokens], np.arange(rows))
    with gradient_computer(model, adaptation, "mlx", recompute=recompute, max_logits=execution.max_logits) as compute:
        peaks = []
        for _ in range(4):
            before = settled_memory()
            mx.eval(compute(0, [batch], form="joined").gradient)
            mx.synchronize()
            peaks.append(mx.get_peak_memory() - before)
    predicted = parts.activations + parts.logits + parts.gradients
    assert predicted == pytest.approx(sorted(peaks[1:])[1], rel=0.15)


@pytest.mark.parametrize(
    ("config", "changes", "reason"),
    [
        (KINDS["mixture"], {"kernels": "cpu"}, "computes layer by layer"),
        (KINDS["mixture"], {"recompute": "blocks"}, "computed again"),
        (KINDS["mixture"], {"recompute": "cheap"}, "computed again"),
        (MAMBA, {}, "token by token"),
    ],
)
def test_what_the_plan_does_not_know_it_says_and_does_not_refuse(
    config: dict[str, Any], changes: dict[str, Any], reason: str
) -> None:
    shape = shape_of(config, "config.json")
    execution = replace(padded_execution(), **changes)
    steps = [unlike_rows(8, 257, 256)]
    planner = MemoryPlanner(shape, execution, AdapterConfig(), "adamw", steps, validation_rows=0)
    parts = planner.parts()
    assert parts.unknown is not None
    assert f"activations of {shape.odd_block} are not predicted" in parts.unknown
    assert reason in parts.unknown
    assert (
        parts.peak
        < 1.5 * shape.weight_bytes(execution.weight_format) + 20 * 4 * trained_part(shape, AdapterConfig()).parameters
    )
    assert planner.best(2 * parts.peak) == execution
    assert planner.refusal(2 * parts.peak, auto=False) is None
    assert "at least" in str(planner.refusal(0.5 * parts.peak, auto=True))


def test_where_no_known_peak_fits_the_most_saving_settings_are_tried() -> None:
    """Checkpointed blocks of a mixture are not predicted, so they are neither promised nor refused."""
    shape = shape_of(KINDS["mixture"], "config.json")
    steps = [unlike_rows(4, 257, 256)]
    planner = MemoryPlanner(shape, free_execution(), AdapterConfig(rank=4), "adamw", steps, validation_rows=0)
    smallest = planner.parts(free_execution().with_batch(1, "none")).peak
    best = planner.best(0.9 * smallest)
    assert best == free_execution().with_batch(1, "blocks")
    assert planner.refusal(0.9 * smallest, auto=False) is None
    asked = replace(planner, execution=padded_execution())
    assert "not predicted" in str(asked.refusal(0.9 * smallest, auto=False))


@pytest.mark.slow
def test_prediction_is_within_15_percent_of_the_measured_peak(wide_model_folder: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    rows = [{"text": " ".join(generator.choice(["red", "river", "north"], 300))} for _ in range(8)]
    write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    done = train(
        f"model={wide_model_folder}",
        f"dataset={tmp_path / 'data'}",
        "dataset.max_seq_length=128",
        "training.batch_size=4",
        "training.steps=2",
        "training.eval_every=0",
        "optimizer.warmup_steps=0",
        f"hydra.run.dir={tmp_path / 'run'}",
        cwd=tmp_path,
    )
    assert done.status == 0, done.errors
    measured = max(event["peak_memory"] for event in events(tmp_path / "run", "step_done"))
    shape = read_shape(wide_model_folder)
    execution = execution_for(TrainConfig(), shape, shape.checkpoint, CPU)
    planner = MemoryPlanner(shape, execution, AdapterConfig(), "adamw", [unlike_rows(4, 128, 127)], 0)
    assert planner.parts().peak == pytest.approx(measured, rel=0.15)
