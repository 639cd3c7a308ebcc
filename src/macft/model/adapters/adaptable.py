"""Which layers of a model mlx-lm's LoRA and DoRA train, and how many parameters that takes.

mlx-lm itself is asked, layer by layer: its ``linear_to_lora_layers`` is given the layers in a stand-in for a model, so
that nothing of the model changes. What it takes by default is what can be trained; what it makes of a layer shows the
number of parameters. Arrays are not evaluated, so the layers of a model of any size can be asked for.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from macft.model.mlx_lm_tuner import LoRASwitchLinear, linear_to_lora_layers

# What mlx-lm raises for a layer that it can't convert.
_ERRORS = (ValueError, TypeError, AttributeError, IndexError, RuntimeError, KeyError)


@dataclass(frozen=True)
class Addition:
    """Parameters that an adapter adds to a layer: ``fixed``, and ``per_rank`` for each unit of its rank."""

    fixed: int
    per_rank: int

    def parameters(self, rank: int) -> int:
        """Their number at ``rank``."""
        return self.fixed + self.per_rank * rank


@dataclass(frozen=True)
class AdaptableLayer:
    """A layer of a block that mlx-lm's LoRA takes by default.

    ``name`` is its name in the block, ``parameters`` the number of its own. ``lora`` and ``dora`` say what such an
    adapter adds, or in a few words why it can't be added. ``is_experts``: it is a layer of a mixture of experts, which
    is called with the numbers of the experts.
    """

    name: str
    parameters: int
    lora: Addition | str
    dora: Addition | str
    is_experts: bool

    def trained_parameters(self, kind: str, rank: int) -> int:
        """How many an adapter of this ``adapter.type`` trains; the layer's own with "full"."""
        if kind == "full":
            return self.parameters
        addition = self.dora if kind == "dora" else self.lora
        return addition.parameters(rank) if isinstance(addition, Addition) else 0

    def obstacle(self, kind: str) -> str | None:
        """Why an adapter of this kind can't be added; None if it can."""
        addition = {"lora": self.lora, "dora": self.dora}.get(kind)
        return addition if isinstance(addition, str) else None


@dataclass(frozen=True)
class AdaptableBlock:
    """A block: the number of all its parameters, and those of its layers that may get an adapter."""

    parameters: int
    layers: tuple[AdaptableLayer, ...]


def adaptable_blocks(model: nn.Module) -> tuple[AdaptableBlock, ...]:
    """The blocks of ``model``, which is frozen as a whole by this."""
    model.freeze()
    known: dict[Any, AdaptableLayer | None] = {}
    return tuple(_block(block, known) for block in model.layers)


def _block(block: nn.Module, known: dict[Any, AdaptableLayer | None]) -> AdaptableBlock:
    """``known``: layers that were looked at, by what they are like."""
    read = set(_attributes_read(block))
    layers = []
    for name, module in block.named_modules():
        if not name:
            continue
        parameters = tree_flatten(module.parameters())
        look = (type(module), *((key, value.shape, value.dtype) for key, value in parameters))
        if look not in known:
            known[look] = _layer(module)
        if (layer := known[look]) is None:
            continue
        layer = replace(layer, name=name)
        if gone := [attribute for owner, attribute in read if owner == name and not _keeps(module, attribute)]:
            reason = f"the model's code reads its {gone[0]}"
            layer = replace(layer, lora=reason, dora=reason)
        layers.append(layer)
    return AdaptableBlock(sum(int(value.size) for _, value in tree_flatten(block.parameters())), tuple(layers))


def _layer(module: nn.Module) -> AdaptableLayer | None:
    """What can be made of ``module``; None where mlx-lm's LoRA doesn't take it."""
    try:
        made = converted(module, "lora")
    except _ERRORS:
        made = module  # it would be taken, but fails
    if made is None:
        return None
    return AdaptableLayer(
        name="",
        parameters=sum(int(value.size) for _, value in tree_flatten(module.parameters())),
        lora=_addition(module, "lora"),
        dora=_addition(module, "dora"),
        is_experts=isinstance(made, LoRASwitchLinear),
    )


def _addition(module: nn.Module, kind: str) -> Addition | str:
    if kind == "dora" and hasattr(module, "to_lora"):
        # mlx-lm would put a plain linear layer in the place of one that has a way of its own.
        return f"{type(module).__name__} has a LoRA of its own"
    sizes = []
    for rank in (1, 2):
        try:
            made = converted(module, kind, rank=rank)
        except _ERRORS as error:
            return " ".join(str(error).split()).rstrip(".") or type(error).__name__
        assert made is not None
        sizes.append(sum(int(value.size) for _, value in tree_flatten(made.trainable_parameters())))
    return Addition(2 * sizes[0] - sizes[1], sizes[1] - sizes[0])


def converted(layer: nn.Module, kind: str, *, rank: int = 1) -> nn.Module | None:
    """What mlx-lm's default makes of ``layer``, which stays as it is; None where it leaves such a layer alone.

    The new parameters are random, of MLX's global state.

    Raises:
        ValueError: mlx-lm has no adapter of this kind for the layer, or another error of its own.
    """
    stand_in = _StandIn(layer)
    settings = {"rank": rank, "scale": 1.0, "dropout": 0.0}
    linear_to_lora_layers(stand_in, 1, settings, use_dora=kind == "dora")
    return stand_in.made


class _StandIn:
    """For ``linear_to_lora_layers``: a model of one block with one layer, which keeps what the layer becomes."""

    def __init__(self, layer: nn.Module):
        self._layer = layer
        self.layers = [self]
        self.made: nn.Module | None = None

    def apply_to_modules(self, function: Callable[[str, nn.Module], Any]) -> None:
        function("layer", self._layer)

    def named_modules(self) -> list[tuple[str, nn.Module]]:
        # After the block, the whole model is gone through for layers outside of the blocks.
        return [("layer", self._layer)] if self.made is None else []

    def update_modules(self, modules: Mapping[str, nn.Module]) -> None:
        self.made = modules["layer"]


def _keeps(layer: nn.Module, attribute: str) -> bool:
    """Whether what LoRA makes of ``layer`` has this attribute of it, or neither has."""
    if not hasattr(layer, attribute):
        return True
    try:
        return hasattr(converted(layer, "lora"), attribute)
    except _ERRORS:
        return True  # a reason not to convert it is known already


def _attributes_read(block: nn.Module) -> Iterator[tuple[str, str]]:
    """(name of a module inside ``block``, attribute) that the code of the modules above it names."""
    modules: dict[str, nn.Module] = dict(block.named_modules())
    for name, module in modules.items():
        kind: type = type(module)
        for chain in _chains(kind):
            for end in range(1, len(chain)):
                inner = ".".join([*([name] if name else []), *chain[:end]])
                if inner in modules:
                    yield inner, chain[end]


@lru_cache(maxsize=512)
def _chains(kind: type) -> frozenset[tuple[str, ...]]:
    """Names of the chains ``self.a.b.c`` in the methods of ``kind``; none where its source isn't known."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return frozenset()
    bodies = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name not in _NOT_COMPUTATION
    ]
    nodes: Iterable[ast.AST] = (node for body in bodies for node in ast.walk(body))
    return frozenset(chain for node in nodes if len(chain := _chain(node)) > 1)


_NOT_COMPUTATION = ("__init__", "sanitize", "fuse", "to_quantized", "to_lora", "shard")


def _chain(node: ast.AST) -> tuple[str, ...]:
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    is_self = isinstance(node, ast.Name) and node.id == "self"
    return tuple(reversed(names)) if is_self else ()


def names_of(blocks: Sequence[AdaptableBlock]) -> list[str]:
    """The names of all layers in ``blocks``, each once, in their order."""
    return list(dict.fromkeys(layer.name for block in blocks for layer in block.layers))
