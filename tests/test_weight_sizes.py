"""The bytes of weights, counted from a config.json, are those of the arrays."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from harness.families import configuration
from macft.device.kind import Device
from macft.model.adapters.settings import AdapterConfig
from macft.model.blocks.ends import BEFORE
from macft.model.execution import WeightFormat, resolve
from macft.model.settings import ModelConfig
from macft.model.shape import ModelShape, shape_of
from macft.parallel.stage_layout import even_layout
from macft.planner.inference import blocks_with_room
from macft.planner.memory_planner import MemoryPlanner
from macft.planner.placement.configured_layout import block_costs
from macft.planner.stage import StagePlanner
from macft.planner.workload import assumed_steps

FORMATS: dict[str, dict[str, Any]] = {
    "affine": {"bits": 4, "group_size": 32},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    "nvfp4": {"bits": 4, "group_size": 16, "mode": "nvfp4"},
    "mxfp8": {"bits": 8, "group_size": 32, "mode": "mxfp8"},
}
# Blocks with and without experts.
UNEVEN = configuration("jamba") | {"num_hidden_layers": 4}


def quantized(config: dict[str, Any], settings: dict[str, Any], own: dict[str, Any]) -> nn.Module:
    """The model in bfloat16, quantised as a checkpoint with these settings, and those of its ``own`` layers, is."""
    from mlx_lm.utils import _get_classes

    model_class, arguments = _get_classes(config)
    model: nn.Module = model_class(arguments.from_dict(config))
    model.set_dtype(mx.bfloat16)

    def kind(name: str, layer: nn.Module) -> Any:
        if not hasattr(layer, "to_quantized") or layer.weight.shape[-1] % settings["group_size"]:
            return False
        return own.get(name, settings)

    nn.quantize(model, class_predicate=kind)
    return model


def sizes(model: nn.Module) -> list[int]:
    """Bytes of each block."""
    return [sum(value.nbytes for _, value in tree_flatten(block.parameters())) for block in model.layers]


@pytest.mark.parametrize("family", ["llama", "jamba", "glm4_moe"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_quantised_checkpoint_is_counted_to_the_byte(family: str, name: str) -> None:
    settings, config = FORMATS[name], configuration(family)
    own: dict[str, Any] = {
        "model.layers.0.mlp.down_proj": {"bits": 8, "group_size": 32},
        "model.layers.1.self_attn.q_proj": False,
    }
    model = quantized(config, settings, own)
    shape = shape_of(config | {"quantization": settings | own}, "config.json")
    assert list(shape.block_bytes(shape.checkpoint)) == sizes(model)
    whole = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    assert shape.weight_bytes(shape.checkpoint) == whole
    floats = WeightFormat("float32")  # as a CPU holds them
    assert shape.weight_bytes(floats) == 4 * shape.parameters


def test_experts_alone_are_quantised_in_the_form_that_says_no_more() -> None:
    config = configuration("gpt_oss")
    shape = shape_of(config | {"quantization_config": {"quant_method": "mxfp4"}}, "config.json")
    embedding = 2 * config["vocab_size"] * config["hidden_size"]
    assert shape.outside_bytes(shape.checkpoint, {BEFORE}) >= embedding
    assert sum(shape.block_bytes(shape.checkpoint)) < sum(shape.block_bytes(WeightFormat("bfloat16")))


def uneven() -> ModelShape:
    return shape_of(UNEVEN, "config.json")


def test_stages_of_unequal_blocks_are_counted_by_their_own() -> None:
    shape = uneven()
    small, large = shape.block_bytes(shape.checkpoint)[:2]
    assert large > 1.5 * small
    execution = resolve(ModelConfig(), shape.checkpoint, Device("metal"), packing="false", compile="false")
    planner = MemoryPlanner(shape, execution.pipelined(0), AdapterConfig(), "adamw", assumed_steps(4, 32), 0)
    layout = even_layout(4, range(4))
    held = [StagePlanner(planner, 1e12, layout, rank, 0, "auto", False).parts(1).weights for rank in (1, 2)]
    assert held == [large, small]
    costs = block_costs(shape, 0, keeps=True)
    assert costs[0] == costs[2]
    assert costs[0] / costs[1] == pytest.approx(shape.active_parameters[0] / shape.active_parameters[1])


def test_blocks_that_follow_each_other_have_room() -> None:
    shape = uneven()
    sizes, outside = shape.block_bytes(shape.checkpoint), shape.outside_bytes(shape.checkpoint)
    execution = resolve(ModelConfig(), shape.checkpoint, Device("metal"), packing="false", compile="false")

    def room(free: float) -> int:
        return blocks_with_room(shape, execution, (outside + free) / 0.8 + 1)

    assert room(sum(sizes)) == 4
    assert [room(sum(sizes[:2])), room(sizes[1]), room(sizes[1] - 2)] == [2, 1, 0]
    assert room(sum(sizes[1:])) == 3
    assert room(2 * sum(sizes)) == 8
