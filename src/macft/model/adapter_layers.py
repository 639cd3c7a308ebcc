"""Which layers an adapter configuration names: the same answer for the adapter that is made and for its prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# isort: split
import mlx.nn as nn

from macft.errors import ConfigError
from macft.model.adapter_settings import AdapterConfig


class AdapterLayers(NamedTuple):
    """Block numbers, ascending, and names inside a block of the projections to train, ``self_attn.q_proj`` say."""

    blocks: list[int]
    projections: list[str]


def adaptable_projections(block: nn.Module) -> list[str]:
    """Names inside ``block`` of the layers that can get an adapter: linear ones, quantised or not, and mlx-lm's own."""
    kinds = (nn.Linear, nn.QuantizedLinear)
    return [name for name, layer in block.named_modules() if isinstance(layer, kinds) or hasattr(layer, "to_lora")]


def select_layers(config: AdapterConfig, available: Sequence[Sequence[str]]) -> AdapterLayers:
    """What ``config`` chooses of a model whose blocks have the ``available`` projections, one list for each block.

    Raises:
        ConfigError: a block number or projection the model doesn't have.
    """
    blocks = _select_blocks(config, len(available))
    names = list(dict.fromkeys(name for block in blocks for name in available[block]))
    if not config.targets:
        return AdapterLayers(blocks, names)
    chosen: list[str] = []
    for target in config.targets:
        matches = [name for name in names if name == target or name.endswith("." + target)]
        if not matches:
            short = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise ConfigError(f"adapter.targets: this model has no projection '{target}'; it has {', '.join(short)}")
        chosen += matches
    return AdapterLayers(blocks, sorted(set(chosen), key=names.index))


def _select_blocks(config: AdapterConfig, count: int) -> list[int]:
    if config.layers:
        missing = [layer for layer in config.layers if layer >= count]
        if missing:
            raise ConfigError(f"adapter.layers: {missing} don't exist; this model's blocks are 0 to {count - 1}")
        return sorted(config.layers)
    if config.num_layers > count:
        raise ConfigError(f"adapter.num_layers: {config.num_layers} is more than this model's {count} blocks")
    return list(range(count))[-config.num_layers if config.num_layers > 0 else 0 :]
