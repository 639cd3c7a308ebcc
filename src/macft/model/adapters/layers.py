"""Which layers an adapter configuration names: the same answer for the adapter that is made and for its prediction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from macft.errors import ConfigError
from macft.model.adapters.adaptable import AdaptableBlock, AdaptableLayer, names_of
from macft.model.adapters.settings import AdapterConfig


class AdapterLayers(NamedTuple):
    """Block numbers, ascending, and names inside a block of the projections to train, ``self_attn.q_proj`` say.

    A block that lacks some of them, one without experts perhaps, has the others.
    """

    blocks: list[int]
    projections: list[str]


def select_layers(config: AdapterConfig, available: Sequence[AdaptableBlock]) -> AdapterLayers:
    """What ``config`` chooses of a model with these blocks.

    Raises:
        ConfigError: a block number or projection the model doesn't have, or one that can't have such an adapter.
    """
    blocks = _select_blocks(config, len(available))
    names = names_of([available[block] for block in blocks])
    if not names and not (config.type == "full" and not config.targets):
        raise ConfigError("adapter.type: mlx-lm has no adapter for this model's layers; use adapter.type=full")
    chosen = sorted({name for target in config.targets for name in _matches(target, names)}, key=names.index)
    chosen = chosen if config.targets else names
    if config.type != "full":
        _check(config, [layer for block in blocks for layer in available[block].layers], set(chosen))
    return AdapterLayers(blocks, chosen)


def chosen_layers(block: AdaptableBlock, projections: Iterable[str]) -> list[AdaptableLayer]:
    """Those layers of ``block`` that have one of these names."""
    wanted = set(projections)
    return [layer for layer in block.layers if layer.name in wanted]


def _matches(target: str, names: Sequence[str]) -> list[str]:
    matches = [name for name in names if name == target or name.endswith("." + target)]
    if not matches:
        short = sorted({name.rsplit(".", 1)[-1] for name in names})
        raise ConfigError(f"adapter.targets: this model has no projection '{target}'; it has {', '.join(short)}")
    return matches


def _check(config: AdapterConfig, layers: Sequence[AdaptableLayer], chosen: set[str]) -> None:
    """Raises ConfigError where an adapter of this kind can't be added to one of the layers that were ``chosen``."""
    bad = {layer.name: reason for layer in layers if (reason := layer.obstacle(config.type)) is not None}
    refused = [name for name in bad if name in chosen]
    if not refused:
        return
    kind = {"lora": "LoRA", "dora": "DoRA"}[config.type]
    good = list(dict.fromkeys(layer.name for layer in layers if layer.name not in bad))
    line = f"adapter.targets: {kind} can't be added to {refused[0]}"
    line += f" and {len(refused) - 1} more" if len(refused) > 1 else ""
    line += f" ({bad[refused[0]]})"
    instead = _shortest_targets([name for name in good if not config.targets or name in chosen] or good, list(bad))
    raise ConfigError(f"{line}; use 'adapter.targets=[{','.join(instead)}]'" if instead else line)


def _shortest_targets(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """Ends of ``names``, as ``adapter.targets`` takes them, that match all of these and none of ``others``."""
    ends: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            end = ".".join(parts[-length:])
            if not any(other == end or other.endswith("." + end) for other in others):
                ends[end] = None
                break
    return sorted(ends)


def _select_blocks(config: AdapterConfig, count: int) -> list[int]:
    if config.layers:
        missing = [layer for layer in config.layers if layer >= count]
        if missing:
            raise ConfigError(f"adapter.layers: {missing} don't exist; this model's blocks are 0 to {count - 1}")
        return sorted(config.layers)
    if config.num_layers > count:
        raise ConfigError(f"adapter.num_layers: {config.num_layers} is more than this model's {count} blocks")
    return list(range(count))[-config.num_layers if config.num_layers > 0 else 0 :]
