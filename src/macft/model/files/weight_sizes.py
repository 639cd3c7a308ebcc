"""How many bytes the weights of a model take, part by part: as its files hold them, and in other forms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from macft.model.blocks.ends import BOTH_ENDS, find_ends
from macft.model.execution import WeightFormat

# What formats are whose settings give their names only, as mlx-lm reads them: bits, group size, mode.
_METHODS = {"mxfp4": (4, 32, "mxfp4"), "mxfp8": (8, 32, "mxfp8"), "modelopt": (4, 16, "nvfp4")}
_AFFINE = "affine"


@dataclass(frozen=True)
class Quantization:
    """Groups of ``group_size`` values of ``bits`` each; ``mode`` as in MLX."""

    bits: int
    group_size: int
    mode: str = _AFFINE

    def bytes_a_value(self, float_bytes: int) -> float:
        """With the group's scale and bias, which are floating-point values, or its scale of one byte."""
        scales = 2 * float_bytes if self.mode == _AFFINE else 1
        return self.bits / 8 + scales / self.group_size


@dataclass(frozen=True)
class StoredQuantization:
    """What a config.json says of quantised layers: ``base`` of all, and ``layers`` that differ, by name.

    A layer that maps to None is not quantised. ``experts_only``: neither are matrices that are no experts.
    """

    base: Quantization | None
    layers: dict[str, Quantization | None]
    experts_only: bool = False

    @classmethod
    def of(cls, config: dict[str, Any]) -> StoredQuantization:
        """As mlx-lm reads the ``config`` of a model."""
        text = config.get("text_config")
        settings = config.get("quantization") or config.get("quantization_config")
        settings = settings or (text.get("quantization_config") if isinstance(text, dict) else None)
        if not isinstance(settings, dict):
            return cls(None, {})
        layers: dict[str, Quantization | None] = {}
        if config.get("quantization"):
            for name, own in settings.items():
                if isinstance(own, dict) or own is False:
                    layers[name] = _quantization(own) if own else None
        return cls(_quantization(settings), layers, settings.get("quant_method") == "mxfp4")

    def of_layer(self, name: str, layer: nn.Module) -> Quantization | None:
        """How the layer ``name`` is held, which can be quantised."""
        if name in self.layers:
            return self.layers[name]
        base = self.base
        if base is None or layer.weight.shape[-1] % base.group_size or (self.experts_only and layer.weight.ndim < 3):
            return None
        return base

    def predicate(self, name: str, layer: nn.Module) -> dict[str, Any] | bool:
        """For ``nn.quantize``: how it is to hold the layer ``name``, or False."""
        kind = self.of_layer(name, layer) if hasattr(layer, "to_quantized") else None
        return False if kind is None else asdict(kind)


def _quantization(settings: dict[str, Any]) -> Quantization | None:
    """Of ``quantization`` or ``quantization_config``, or of a layer in it; None for floats."""
    from mlx_lm.utils import _compressed_tensors_quantization

    method = settings.get("quant_method")
    if method == "bitnet":
        return None
    if method == "compressed-tensors":
        try:
            settings = _compressed_tensors_quantization(settings)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return None  # loading will say that it can't be read
    if method == "fp8" and settings.get("scale_fmt") == "ue8m0":
        method = "mxfp8"
    own = settings.get("bits"), settings.get("group_size") or 64, settings.get("mode") or _AFFINE
    bits, group_size, mode = _METHODS.get(str(method), own)
    try:
        return Quantization(int(bits), int(group_size), str(mode)) if bits else None
    except (TypeError, ValueError):
        return None


@dataclass(frozen=True)
class WeightSize:
    """Numbers of values: ``matrices`` of layers that can be quantised, and ``others``.

    ``stored``: how many of the matrices' values are quantised in the checkpoint, and how; the rest are floats.
    """

    matrices: int = 0
    others: int = 0
    stored: tuple[tuple[Quantization, int], ...] = ()

    @property
    def values(self) -> int:
        """All of them."""
        return self.matrices + self.others

    def bytes_as(self, weights: WeightFormat, *, as_stored: bool) -> float:
        """Size in the form ``weights``; ``as_stored``: that of the checkpoint, layers that differ included."""
        quantized: Iterable[tuple[Quantization, int]] = ()
        if weights.bits is not None:
            uniform = Quantization(weights.bits, weights.group_size)
            quantized = self.stored if as_stored else [(uniform, self.matrices)]
        floats = self.values - sum(count for _, count in quantized)
        packed = sum(count * kind.bytes_a_value(weights.float_bytes) for kind, count in quantized)
        return floats * weights.float_bytes + packed


@dataclass(frozen=True)
class ModelSizes:
    """Of each of ``blocks``; of what only the ends named (:mod:`~macft.model.blocks.ends`) use; and of the ``rest``."""

    blocks: tuple[WeightSize, ...]
    ends: tuple[tuple[frozenset[str], WeightSize], ...]
    rest: WeightSize

    def outside(self, ends: Collection[str] = BOTH_ENDS) -> list[WeightSize]:
        """What a node holds outside of the blocks, where it computes ``ends``."""
        return [self.rest, *(size for users, size in self.ends if users & set(ends))]


def sizes_of(model: nn.Module, stored: StoredQuantization) -> ModelSizes:
    """The sizes of ``model``, whose arrays need not be there."""
    modules = dict(model.named_modules())
    places = {id(block): number for number, block in enumerate(model.layers)}
    parts: dict[str, int] = {}  # by the name of a module, its block
    for name, module in modules.items():
        if id(module) in places:
            parts[name] = places[id(module)]
    users = {name: part.ends for part in find_ends(model) for name in part.names}
    blocks: dict[int, list[tuple[str, mx.array]]] = {number: [] for number in places.values()}
    ends: dict[frozenset[str], list[tuple[str, mx.array]]] = {}
    rest: list[tuple[str, mx.array]] = []
    for name, value in tree_flatten(model.parameters()):
        number = next((parts[owner] for owner in _owners(name) if owner in parts), None)
        if number is not None:
            blocks[number].append((name, value))
        elif name in users:
            ends.setdefault(users[name], []).append((name, value))
        else:
            rest.append((name, value))

    def size(arrays: list[tuple[str, mx.array]]) -> WeightSize:
        matrices = others = 0
        found: Counter[Quantization] = Counter()
        for name, value in arrays:
            owner, _, own = name.rpartition(".")
            layer = modules.get(owner)
            if own != "weight" or layer is None or not hasattr(layer, "to_quantized"):
                others += int(value.size)
                continue
            matrices += int(value.size)
            if (kind := stored.of_layer(owner, layer)) is not None:
                found[kind] += int(value.size)
        return WeightSize(matrices, others, tuple(found.items()))

    return ModelSizes(
        tuple(size(blocks[number]) for number in sorted(blocks)),
        tuple((each, size(arrays)) for each, arrays in ends.items()),
        size(rest),
    )


def _owners(name: str) -> Iterable[str]:
    """The names of the modules that hold the array ``name``, the nearest first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
