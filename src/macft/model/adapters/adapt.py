"""Makes a frozen model trainable: LoRA and DoRA layers, or chosen layers' own weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import get_total_parameters

from macft.errors import ConfigError, ModelError
from macft.model.adapters.adaptable import AdaptableBlock, adaptable_blocks
from macft.model.adapters.dropout import DropoutKeys, make_dropout_reproducible
from macft.model.adapters.layers import AdapterLayers, chosen_layers, select_layers
from macft.model.adapters.settings import AdapterConfig
from macft.model.blocks.block_weights import BlockWeights
from macft.model.mlx_lm_tuner import linear_to_lora_layers


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


def adapt(
    model: nn.Module,
    config: AdapterConfig,
    *,
    seed: int,
    evaluated: bool = True,
    streamed: BlockWeights | None = None,
) -> Adaptation:
    """Adds the adapter to ``model`` in place and leaves only its parameters trainable.

    The initial values depend on ``seed`` alone. They are float32, as in mlx-lm. Without ``evaluated``, all of the
    model's arrays stay to be computed: for a model whose sizes are wanted only. ``streamed`` holds the weights of the
    blocks where they are not in memory.

    Raises:
        ConfigError: a layer number or projection the model doesn't have, or one that can't have such an adapter.
        ModelError: the model has no gradient.
    """
    total = int(get_total_parameters(model))
    available = adaptable_blocks(model)
    chosen = select_layers(config, available)
    mx.random.seed(seed)
    if config.type == "full":
        settings = _unfreeze(model, chosen, config)
    else:
        with streamed.adapting() if streamed is not None else nullcontext():
            settings = _add_low_rank(model, chosen, available, config)
    keys = make_dropout_reproducible(model)
    if evaluated:
        mx.eval(model.parameters())
    with streamed.left_out() if streamed is not None else nullcontext():
        _check_gradient(model, keys, evaluated=evaluated)
    trainable = sum(int(value.size) for _, value in tree_flatten(model.trainable_parameters()))
    return Adaptation(settings, keys, trainable, total, _describe(config, chosen, available))


def _add_low_rank(
    model: nn.Module, chosen: AdapterLayers, available: Sequence[AdaptableBlock], config: AdapterConfig
) -> dict[str, Any]:
    blocks, names = chosen
    count = len(model.layers)
    if blocks == list(range(count - len(blocks), count)) and not _named_otherwise(model, chosen, available):
        num_layers, keys = len(blocks), names
    else:
        # mlx-lm counts blocks from the end; any other choice is written with full module paths instead.
        num_layers, keys = 0, _paths(model, chosen, available)
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


def _named_otherwise(model: nn.Module, chosen: AdapterLayers, available: Sequence[AdaptableBlock]) -> bool:
    """Whether a module that can't be adapted has the name of one in another block."""
    wanted = set(chosen.projections)
    blocks = [dict(model.layers[number].named_modules()).keys() for number in chosen.blocks]
    taken = [{layer.name for layer in chosen_layers(available[number], wanted)} for number in chosen.blocks]
    return any((names & wanted) - own for names, own in zip(blocks, taken, strict=True))


def _paths(model: nn.Module, chosen: AdapterLayers, available: Sequence[AdaptableBlock]) -> list[str]:
    """Where in the model the chosen layers are."""
    names = {id(module): name for name, module in model.named_modules()}
    blocks = [(names.get(id(model.layers[number])), available[number]) for number in chosen.blocks]
    if any(name is None for name, _ in blocks):
        raise ConfigError("adapter.layers: this model's blocks have no module path; use adapter.num_layers")
    return [f"{name}.{layer.name}" for name, block in blocks for layer in chosen_layers(block, chosen.projections)]


def _unfreeze(model: nn.Module, chosen: AdapterLayers, config: AdapterConfig) -> dict[str, Any]:
    for block in chosen.blocks:
        layer = model.layers[block]
        if any("scales" in module for module in layer.modules()):
            raise ConfigError(
                "adapter.type: full needs an unquantised base, quantised weights can't be trained; "
                "add model.quantization=none"
            )
        if not config.targets:
            layer.unfreeze()
            continue
        for name, module in layer.named_modules():
            if name in chosen.projections:
                module.unfreeze()
    return {"fine_tune_type": "full", "num_layers": len(chosen.blocks), "lora_parameters": None}


def _check_gradient(model: nn.Module, keys: DropoutKeys, *, evaluated: bool) -> None:
    """Raises ModelError where the adapted ``model`` fails on a few tokens, or has no gradient; none is computed.

    Unless ``evaluated`` its result isn't either, for which a model without values would be made whole.
    ConfigError where its dropout can't be told by the tokens' rows.
    """
    tokens = mx.arange(1, 9)[None]
    was_training = model.training
    model.train()
    try:
        with keys.using(mx.zeros((1,), mx.uint32), tokens.size):
            value, _ = nn.value_and_grad(model, lambda tokens: model(tokens).sum())(tokens)
            if evaluated:
                mx.eval(value)
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError, KeyError, NotImplementedError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"this model can't be trained on this device with mlx-lm's code: {reason}") from error
    finally:
        model.train(was_training)


def _describe(config: AdapterConfig, chosen: AdapterLayers, available: Sequence[AdaptableBlock]) -> str:
    layers = [chosen_layers(available[number], chosen.projections) for number in chosen.blocks]
    counts = {len(each) for each in layers}
    where = f"{len(layers)} blocks, "
    is_same = len(counts) == 1
    count = counts.pop() if is_same else sum(map(len, layers))
    where += f"{count} projection{'' if count == 1 else 's'}{' each' if is_same else ''}"
    if any(layer.is_experts for each in layers for layer in each):
        where += ", those of experts too"
    if config.type == "full":
        return f"full fine-tuning, {where}"
    kind = {"lora": "rsLoRA" if config.rslora else "LoRA", "dora": "DoRA"}[config.type]
    return f"{kind} rank {config.rank}, scale {config.effective_scale():g}, {where}"
