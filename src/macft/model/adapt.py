"""Makes a frozen model trainable: LoRA and DoRA layers, or chosen layers' own weights."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import get_total_parameters

from macft.errors import ConfigError
from macft.model.adapter_layers import adaptable_projections, select_layers
from macft.model.adapter_settings import AdapterConfig
from macft.model.block_weights import BlockWeights
from macft.model.dropout import DropoutKeys, make_dropout_reproducible


@dataclass(frozen=True)
class Adaptation:
    """What :func:`adapt` did to the model.

    ``mlx_lm_config`` holds the fields of mlx-lm's ``adapter_config.json`` that rebuild the same layers.
    """

    mlx_lm_config: dict[str, Any]
    dropout_keys: DropoutKeys
    trainable_parameters: int
    total_parameters: int
    description: str


def adapt(model: nn.Module, config: AdapterConfig, *, seed: int, streamed: BlockWeights | None = None) -> Adaptation:
    """Adds the adapter to ``model`` in place and leaves only its parameters trainable.

    The initial values depend on ``seed`` alone. They are float32, as in mlx-lm. ``streamed`` holds the weights of the
    blocks where they are not in memory.

    Raises:
        ConfigError: a layer number or projection the model doesn't have.
    """
    model.freeze()
    total = int(get_total_parameters(model))
    blocks, names = select_layers(config, [adaptable_projections(block) for block in model.layers])
    mx.random.seed(seed)
    if config.type == "full":
        settings = _unfreeze(model, blocks, names, config)
    else:
        with streamed.adapting() if streamed is not None else nullcontext():
            settings = _add_low_rank(model, blocks, names, config)
    keys = make_dropout_reproducible(model)
    mx.eval(model.parameters())
    trainable = sum(int(value.size) for _, value in tree_flatten(model.trainable_parameters()))
    return Adaptation(settings, keys, trainable, total, _describe(config, blocks, names))


def _add_low_rank(model: nn.Module, blocks: list[int], names: list[str], config: AdapterConfig) -> dict[str, Any]:
    count = len(model.layers)
    last_blocks = blocks == list(range(count - len(blocks), count))
    if last_blocks:
        num_layers, keys = len(blocks), names
    else:
        # mlx-lm counts blocks from the end; any other choice is spelt with full module paths instead.
        prefix = _blocks_prefix(model)
        num_layers, keys = 0, [f"{prefix}.{block}.{name}" for block in blocks for name in names]
    settings = {
        "fine_tune_type": config.type,
        "num_layers": num_layers,
        "lora_parameters": {
            "rank": config.rank,
            "scale": config.effective_scale(),
            "dropout": config.dropout,
            "keys": keys,
        },
    }
    linear_to_lora_layers(model, num_layers, settings["lora_parameters"], use_dora=config.type == "dora")
    return settings


def _blocks_prefix(model: nn.Module) -> str:
    first = model.layers[0]
    for name, module in model.named_modules():
        if module is first:
            return str(name).rsplit(".", 1)[0]
    raise ConfigError("adapter.layers: this model's blocks have no module path; use adapter.num_layers")


def _unfreeze(model: nn.Module, blocks: list[int], names: list[str], config: AdapterConfig) -> dict[str, Any]:
    for block in blocks:
        layer = model.layers[block]
        if any(isinstance(module, nn.QuantizedLinear) for module in layer.modules()):
            raise ConfigError(
                "adapter.type: full needs an unquantised base, quantised weights can't be trained; "
                "add model.quantization=none"
            )
        if not config.targets:
            layer.unfreeze()
            continue
        for name, module in layer.named_modules():
            if name in names:
                module.unfreeze()
    return {"fine_tune_type": "full", "num_layers": len(blocks), "lora_parameters": None}


def _describe(config: AdapterConfig, blocks: list[int], names: list[str]) -> str:
    where = f"{len(blocks)} blocks, {len(names)} projections each"
    if config.type == "full":
        return f"full fine-tuning, {where}"
    kind = {"lora": "rsLoRA" if config.rslora else "LoRA", "dora": "DoRA"}[config.type]
    return f"{kind} rank {config.rank}, scale {config.effective_scale():g}, {where}"
