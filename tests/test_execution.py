"""How a run is computed is decided once: the decision, that model and trainer follow it, that nobody else decides."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import macft
from harness.tiny_model import TINY_CONFIG
from macft.config.execution import execution_for, with_execution
from macft.config.schema import TrainConfig
from macft.data.batch import micro_batches
from macft.data.formats import Row
from macft.device.kind import METAL, Device
from macft.errors import ConfigError
from macft.model.adapters.adapt import adapt
from macft.model.adapters.settings import AdapterConfig
from macft.model.confirm import confirm
from macft.model.execution import Execution, WeightFormat, resolve
from macft.model.load import load
from macft.model.settings import ModelConfig
from macft.model.shape import read_shape, read_weight_format
from macft.planner.memory import trained_part
from macft.planner.node_part import planner_for
from macft.planner.workload import DeviceBatchShape, StepRows
from macft.training.batch_layout import BatchLayout
from macft.training.settings import OptimizerConfig, TrainingConfig, problems

# isort: split
import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.llama import Attention

SOURCE = Path(macft.__file__).parent
CPU = Device("cpu", openblas=True)
FLOATS = WeightFormat("bfloat16")
FOUR_BITS = WeightFormat("bfloat16", 4, 64)


def decided(model: dict[str, Any], checkpoint: WeightFormat, device: Device, **training: Any) -> Execution:
    return resolve(ModelConfig(**model), checkpoint, device, **training)


@pytest.mark.parametrize(
    ("model", "checkpoint", "device", "expected"),
    [
        ({}, FOUR_BITS, CPU, ("float32", None, None, "cpu", False)),
        ({}, FOUR_BITS, METAL, ("bfloat16", 4, None, "mlx", True)),
        ({}, FLOATS, METAL, ("bfloat16", None, None, "mlx", True)),
        ({"quantization": "4bit"}, FLOATS, CPU, ("float32", None, 4, "cpu", False)),
        ({"quantization": "8bit"}, FLOATS, METAL, ("bfloat16", 8, None, "mlx", True)),
        ({"quantization": "keep"}, FOUR_BITS, CPU, ("float32", 4, None, "mlx", False)),
        ({"quantization": "none"}, FOUR_BITS, METAL, ("bfloat16", None, None, "mlx", False)),
        ({"precision": "float16"}, FLOATS, CPU, ("float16", None, None, "mlx", False)),
        ({"precision": "checkpoint"}, FLOATS, CPU, ("bfloat16", None, None, "mlx", True)),
        ({}, FLOATS, Device("cpu"), ("float32", None, None, "mlx", False)),
        ({}, FLOATS, Device("cuda"), ("bfloat16", None, None, "mlx", True)),
    ],
)
def test_weights_and_kernels_follow_device_and_checkpoint(
    model: dict[str, Any], checkpoint: WeightFormat, device: Device, expected: tuple[Any, ...]
) -> None:
    one = decided(model, checkpoint, device)
    weights = one.dtype, one.bits, one.fake_quantized_bits, one.kernels, one.keeps_checkpoint_dtypes
    assert weights == expected


def test_steps_follow_device_and_wishes() -> None:
    on_cpu, on_gpu = decided({}, FLOATS, CPU, can_pack=True), decided({}, FLOATS, METAL, can_pack=True)
    assert (on_cpu.packing, on_cpu.shared_prefixes, on_cpu.pack_tokens, on_cpu.compiled) == (True, True, 512, False)
    assert (on_gpu.packing, on_gpu.shared_prefixes, on_gpu.pack_tokens, on_gpu.compiled) == (True, True, None, True)
    assert on_cpu.loss_chunk_for(4096) == 2**21 // 4096
    assert on_gpu.loss_chunk_for(4096) == 2**24 // 4096
    assert on_gpu.loss_chunk_for(2**24) == 64
    assert decided({}, FLOATS, CPU, loss_chunk=7).loss_chunk_for(4096) == 7
    assert not decided({}, FLOATS, CPU, dropout=True).shared_prefixes
    assert not decided({}, FLOATS, CPU, can_pack=False).packing
    assert decided({}, FLOATS, CPU, compile="true").compiled
    assert decided({}, FLOATS, CPU, compile="true").kernels == "mlx"
    assert not decided({}, FLOATS, METAL, compile="false").compiled
    assert decided({}, FLOATS, CPU, micro_batch_size=3).evaluation_rows == 3


def test_what_is_recomputed_follows_wish_and_kernels() -> None:
    every = {"auto": "none", "none": "none", "cheap": "cheap", "blocks": "blocks"}
    for wish, expected in every.items():
        assert decided({}, FLOATS, METAL, recompute=wish).recompute == expected
    assert decided({}, FLOATS, METAL).recompute_choices == ("none", "cheap", "blocks")
    assert decided({}, FLOATS, METAL).unplanned().recompute == "cheap"
    assert decided({}, FLOATS, METAL, recompute="none").unplanned().recompute == "none"
    assert decided({}, FLOATS, CPU).recompute_choices == ("none", "blocks")
    assert decided({}, FLOATS, CPU, recompute="cheap").recompute == "none"
    assert decided({}, FLOATS, CPU, recompute="cheap").recompute_choices == ()


@pytest.mark.parametrize(
    ("model", "device", "training", "message"),
    [
        ({}, METAL, {"kernels": "cpu"}, "computes on a GPU; use auto or mlx"),
        ({"quantization": "keep"}, CPU, {"kernels": "cpu"}, "add model.quantization=none"),
        ({"precision": "bfloat16"}, CPU, {"kernels": "cpu"}, "add model.precision=float32"),
        ({}, CPU, {"kernels": "cpu", "compile": "true"}, "add training.compile=false"),
        ({}, Device("cpu"), {"kernels": "cpu"}, "no OpenBLAS"),
        ({}, CPU, {"packing": "true", "can_pack": False}, "training.packing: .* use auto or false"),
        ({"quantization": "8bit"}, CPU, {}, "model.quantization: 8bit .* has 4 bits; use keep or none"),
    ],
)
def test_a_wish_that_cannot_be_fulfilled_is_one_line(
    model: dict[str, Any], device: Device, training: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        decided(model, FOUR_BITS, device, **training)
    assert "\n" not in str(caught.value)


def test_wrong_kernels_are_named_before_anything_is_read() -> None:
    (line,) = problems(TrainingConfig(steps=1, kernels="gpu"), OptimizerConfig())
    assert line == "training.kernels: 'gpu' is not one of auto, mlx, cpu"
    (line,) = problems(TrainingConfig(steps=1, kernels="cpu", compile="true"), OptimizerConfig())
    assert line.startswith("training.kernels: cpu can't be compiled")


def test_the_type_of_weights_is_read_from_their_files(tiny_model_folder: Path, bundled_model: Path) -> None:
    assert "dtype" not in TINY_CONFIG
    assert read_weight_format(tiny_model_folder) == WeightFormat("float32")
    assert read_weight_format(bundled_model).bits == 4


WEIGHTS = [{}, {"precision": "bfloat16"}, {"quantization": "4bit", "quantization_group_size": 32}]
STEPS = [
    {},
    {"packing": "false"},
    {"compile": "true"},
    {"kernels": "mlx"},
    {"packing": "true", "micro_batch_size": 2, "recompute": "blocks"},
    {"kernels": "mlx", "recompute": "cheap"},
]
ADAPTERS = [{}, {"dropout": 0.1}, {"type": "full", "dropout": 0.1}, {"type": "dora", "targets": ["q_proj", "up_proj"]}]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_planner_counts_what_is_loaded_and_trained(
    weights: dict[str, Any], adapter: dict[str, Any], tiny_model_folder: Path
) -> None:
    """The decision that the planner uses is what the loaded model, its adapter and the trainer's batches are like."""
    shape, device = read_shape(tiny_model_folder), CPU
    model = ModelConfig(path=str(tiny_model_folder), **weights)
    rows = [Row(np.arange(n % 3, n + n % 3, dtype=np.int32), n // 2) for n in range(4, 300, 37)]
    step = StepRows(rows, np.arange(len(rows)))
    for training in STEPS:
        config = TrainConfig(model=model, adapter=AdapterConfig(**adapter), training=TrainingConfig(**training))
        execution = execution_for(config, shape, shape.checkpoint, device)
        loaded = load(model, tiny_model_folder, execution)
        assert loaded.execution is execution
        assert str(loaded.dtype).removeprefix("mlx.core.") == execution.dtype
        assert loaded.is_quantized == (execution.bits is not None)
        confirmed, revisions = confirm(execution, loaded)
        assert (confirmed, revisions) == (execution, [])
        types = {value.dtype for _, value in tree_flatten(loaded.model.parameters())}
        assert execution.kernels == "mlx" or types == {mx.float32}
        made = adapt(loaded.model, config.adapter, seed=0)
        assert execution.shared_prefixes == (execution.packing and not made.dropout_keys.in_use)
        assert trained_part(shape, config.adapter).parameters == made.trainable_parameters
        batches = micro_batches(rows, step.ids, execution.micro_batch_size)
        layout = BatchLayout.from_execution(execution)
        trained = [DeviceBatchShape.from_batch(part) for batch in batches for part in layout.parts(batch)]
        assert planner_for(config, shape, execution, [step]).step_batches(execution.micro_batch_size) == [trained]
        shown = with_execution(config, execution).training
        assert (shown.micro_batch_size, shown.recompute) == (
            execution.micro_batch_size,
            execution.recompute,
        )


class MaskingAttention(Attention):
    """Makes a mask of its own, which in a pack would be one for all rows together."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:  # noqa: ARG002
        return super().__call__(x, create_causal_mask(x.shape[1]), cache)


def test_a_model_of_unknown_architecture_is_confirmed_once_it_is_loaded(tiny_model_folder: Path) -> None:
    config = TrainConfig(model=ModelConfig(path=str(tiny_model_folder)))
    execution = execution_for(config, None, read_weight_format(tiny_model_folder), CPU)
    assert execution.packing
    loaded = load(config.model, tiny_model_folder, execution)
    assert confirm(execution, loaded) == (execution, [])
    loaded.model.model.layers[0].self_attn.__class__ = MaskingAttention
    revised, notes = confirm(execution, loaded)
    assert revised == execution.padded()
    assert notes == ["this model's attention can't take packed rows, so rows are padded"]
    with pytest.raises(ConfigError, match=r"training\.packing"):
        confirm(replace(execution, requires_packing=True), loaded)
    loaded.model.model.norm.weight = loaded.model.model.norm.weight.astype(mx.float16)
    assert confirm(execution, loaded)[0].kernels == "mlx"


DECIDERS = ("model/execution.py", "config/execution.py", "training/settings.py", "device/", "model/backends/")
KEYS = {"packing", "compile", "kernels", "recompute", "loss_chunk"}


def decisions_in(tree: ast.AST) -> list[str]:
    """Questions about the device, and reads of the keys that an Execution is decided from."""
    names = {"on_cpu", "default_device"}
    called = [
        node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute)
    ]
    read = [
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr in KEYS
        and (node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", ""))
        in ("training", "config", "_config")
    ]
    return [*(name for name in called if name in names), *read]


def test_nobody_else_decides() -> None:
    found = {}
    for path in SOURCE.rglob("*.py"):
        name = path.relative_to(SOURCE).as_posix()
        if not name.startswith(DECIDERS) and (decisions := decisions_in(ast.parse(path.read_text()))):
            found[name] = decisions
    assert found == {}


def test_the_check_sees_decisions() -> None:
    source = "a = mx.default_device() == mx.cpu or on_cpu()\nb = config.training.packing, self.config.compile"
    assert set(decisions_in(ast.parse(source))) == {"default_device", "on_cpu", "packing", "compile"}
    assert decisions_in(ast.parse("mx.compile(f); execution.packing; config.training.batch_size")) == []
