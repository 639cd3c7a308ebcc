"""The sizes of a model that its memory and work follow from, read from config.json: no weights are loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# isort: split
import mlx.nn as nn
from mlx.utils import tree_flatten

from macft.errors import ModelError
from macft.model.packing import may_pack
from macft.model.settings import ModelConfig

_LARGEST_CONFIG = 4 << 20
_OF_LOGITS = ("final_logit_softcapping", "logits_soft_cap", "logit_scale", "logits_scaling")
"""Keys of a config.json for what some models do with their logits."""
FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Linear:
    """A linear layer of a block: its name in the block and its dimensions."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder. ``linears`` are those of one block; ``parameters`` counts all blocks, embeddings and head.

    ``packs``: it is built as packed rows need it. ``plain_head``: logits are a product, not scaled or capped.
    """

    hidden: int
    blocks: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    linears: tuple[Linear, ...]
    parameters: int
    # Parameters of matrices that a quantised checkpoint holds in few bits: linear layers and embeddings.
    matrix_parameters: int
    # Bits and group size of the checkpoint's matrices, where they are quantised.
    bits: int | None
    group_size: int
    # Type of the checkpoint's floating-point values.
    dtype: str
    packs: bool
    plain_head: bool

    @property
    def embedding_parameters(self) -> int:
        """Size of one embedding or head matrix."""
        return self.vocabulary * self.hidden

    @property
    def block_parameters(self) -> int:
        """Parameters of one block's linear layers."""
        return sum(linear.inputs * linear.outputs for linear in self.linears)

    def checkpoint_bytes(self) -> float:
        """Size of the weights as the checkpoint's files hold them."""
        return self.weight_bytes(self.bits, self.group_size, FLOAT_BYTES[self.dtype])

    def weight_bytes(self, bits: int | None, group_size: int, float_bytes: int) -> float:
        """Size of the weights with matrices in ``bits`` (None: floats); a group's scale and bias are 2 bytes each."""
        if bits is None:
            return float(self.parameters * float_bytes)
        others = self.parameters - self.matrix_parameters
        return self.matrix_parameters * (bits / 8 + 4 / group_size) + others * float_bytes


@dataclass(frozen=True)
class HeldWeights:
    """How a device holds the weights: ``bits`` of its matrices (None: floats), bytes of a float."""

    bits: int | None
    group_size: int
    float_bytes: int


def held_weights(shape: ModelShape, config: ModelConfig, *, cpu: bool) -> HeldWeights:
    """What :func:`macft.model.load.load` will make of the checkpoint: its rules for ``auto``, without loading."""
    precision, quantization = config.precision, config.quantization
    if precision == "auto":
        precision = "float32" if cpu else "checkpoint"
    if quantization == "auto":
        quantization = "none" if cpu else "keep"
    float_bytes = FLOAT_BYTES.get(precision, FLOAT_BYTES[shape.dtype])
    bits, group = shape.bits, shape.group_size
    if quantization in ("4bit", "8bit"):
        bits, group = int(quantization[0]), shape.group_size if shape.bits else config.quantization_group_size
    if quantization == "none" or (cpu and quantization != "keep"):
        bits = None
    return HeldWeights(bits, group, float_bytes)


def read_shape(folder: Path) -> ModelShape:
    """The shape of the model in ``folder``, from its config.json alone.

    Raises:
        ModelError: no config.json, or not one of an architecture that mlx-lm knows.
    """
    path = folder / "config.json"
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            raise ModelError(f"{path} is larger than a config.json can be")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object")
    return shape_of(config, str(path))


def shape_of(config: dict[str, Any], source: str) -> ModelShape:
    """The shape that ``config``, the content of a config.json, describes; ``source`` is named in errors.

    The architecture is built by mlx-lm's own class, with arrays that are never evaluated: a 70B model costs nothing.

    Raises:
        ModelError: mlx-lm has no such architecture or its settings are incomplete.
    """
    from mlx_lm.utils import _get_classes

    try:
        model_class, arguments = _get_classes(config)
        model = model_class(arguments.from_dict(config))
        blocks = model.layers
        linears = tuple(
            Linear(name, int(module.weight.shape[1]), int(module.weight.shape[0]))
            for name, module in blocks[-1].named_modules()
            if isinstance(module, nn.Linear)
        )
        text = {**config, **config.get("text_config", {})}
        hidden, heads = int(text["hidden_size"]), int(text["num_attention_heads"])
        head_dim = int(text.get("head_dim") or hidden // heads)
        intermediate = int(text.get("intermediate_size") or 4 * hidden)
        vocabulary = int(text["vocab_size"])
        kv_heads = int(text.get("num_key_value_heads") or heads)
    except (KeyError, TypeError, ValueError, AttributeError, ImportError, IndexError, ZeroDivisionError) as error:
        raise ModelError(f"{source} is not the configuration of a model that mlx-lm knows: {error!r}") from error
    sizes = [(value.ndim, int(value.size)) for _, value in tree_flatten(model.parameters())]
    quantization = config.get("quantization") or {}
    bits = quantization.get("bits") if isinstance(quantization, dict) else None
    dtype = str(text.get("torch_dtype") or text.get("dtype") or "bfloat16").removeprefix("torch.")
    return ModelShape(
        hidden=hidden,
        blocks=len(blocks),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=intermediate,
        vocabulary=vocabulary,
        linears=linears,
        parameters=sum(size for _, size in sizes),
        matrix_parameters=sum(size for dimensions, size in sizes if dimensions > 1),
        bits=int(bits) if bits else None,
        group_size=int(quantization.get("group_size", 64)) if bits else 64,
        dtype=dtype if dtype in FLOAT_BYTES else "bfloat16",
        packs=may_pack(model),
        plain_head=not any(text.get(key) for key in _OF_LOGITS),
    )
