"""The sizes of a model that its memory and work follow from, read from config.json: no weights are loaded."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

# isort: split
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from macft.errors import ModelError
from macft.model.adapters.adaptable import AdaptableBlock, adaptable_blocks
from macft.model.blocks.ends import BOTH_ENDS
from macft.model.execution import FLOAT_BYTES, WeightFormat
from macft.model.files.weight_files import read_header
from macft.model.files.weight_sizes import ModelSizes, StoredQuantization, WeightSize, sizes_of
from macft.model.trials.packable import may_pack

_LARGEST_CONFIG = 4 << 20
# Where exports of NVIDIA's ModelOpt say how they are quantised.
_MODELOPT_SETTINGS = "hf_quant_config.json"
_SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_OF_LOGITS = ("final_logit_softcapping", "logits_soft_cap", "logit_scale", "logits_scaling")
"""Keys of a config.json for what some models do with their logits."""
_LLAMA_PROJECTIONS = {f"self_attn.{name}_proj" for name in "qkvo"} | {
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
}
_LLAMA_NORMS = {"input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"}
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_top_k")
"""Keys of a config.json for how many experts a mixture asks for each token."""


@dataclass(frozen=True)
class Linear:
    """A linear layer of a block: its name in the block and its dimensions."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder. ``parameters`` counts all blocks, embeddings and head; ``active_parameters`` those of each
    block's matrices that one token meets, which of a mixture are those of its experts.

    ``odd_block`` names the class of a block that isn't one of the Llama kind: q, k, v, o, gate, up and down
    projections, of the same sizes in all blocks, and two norms, with perhaps one each for queries and keys. It is None
    where all blocks are of that kind, and ``linears`` are then those of each; ``heads`` and what follows are of use
    only there.
    ``config`` is the content of config.json.
    ``adaptable`` are the layers that may be trained, block by block. ``checkpoint`` is how the files hold the weights.
    ``packs``: it is built as packed rows need it. ``has_dropout``: it drops elements of its own.
    ``plain_head``: logits are a product, not scaled or capped. ``sizes``: of the weights, block by block.
    """

    hidden: int
    blocks: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    linears: tuple[Linear, ...]
    odd_block: str | None
    parameters: int
    active_parameters: tuple[int, ...]
    adaptable: tuple[AdaptableBlock, ...]
    checkpoint: WeightFormat
    packs: bool
    has_dropout: bool
    plain_head: bool
    sizes: ModelSizes
    config: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def embedding_parameters(self) -> int:
        """Size of one embedding or head matrix."""
        return self.vocabulary * self.hidden

    @property
    def block_parameters(self) -> int:
        """Parameters of a block's matrices that one token meets, on average."""
        return sum(self.active_parameters) // self.blocks

    def weight_bytes(self, weights: WeightFormat) -> float:
        """Size of the weights held as ``weights``."""
        return sum(self.block_bytes(weights)) + self.outside_bytes(weights)

    def block_bytes(self, weights: WeightFormat) -> tuple[float, ...]:
        """Size of each block held as ``weights``."""
        return tuple(self._bytes(size, weights) for size in self.sizes.blocks)

    def outside_bytes(self, weights: WeightFormat, ends: Collection[str] = BOTH_ENDS) -> float:
        """Size of what a node holds outside of the blocks, where it computes ``ends``."""
        return sum(self._bytes(size, weights) for size in self.sizes.outside(ends))

    def _bytes(self, size: WeightSize, weights: WeightFormat) -> float:
        stored = self.checkpoint
        as_stored = (weights.bits, weights.group_size) == (stored.bits, stored.group_size)
        return size.bytes_as(weights, as_stored=as_stored)


def read_shape(folder: Path) -> ModelShape:
    """The shape of the model in ``folder``, from its config.json and the headers of its weight files alone.

    Raises:
        ModelError: no config.json, or not one of an architecture that mlx-lm knows.
    """
    shape = shape_of(_read_config(folder), str(folder / "config.json"))
    return replace(shape, checkpoint=_with_dtype_of_files(shape.checkpoint, folder))


def read_weight_format(folder: Path) -> WeightFormat:
    """How the checkpoint in ``folder`` holds its weights; of a model that :func:`read_shape` doesn't know, too.

    Raises:
        ModelError: no config.json.
    """
    return _with_dtype_of_files(_format_from_config(_read_config(folder)), folder)


def _with_dtype_of_files(weights: WeightFormat, folder: Path) -> WeightFormat:
    return replace(weights, dtype=_dtype_of_files(folder) or weights.dtype)


def _read_config(folder: Path) -> dict[str, Any]:
    config = _read_json(folder / "config.json")
    if (folder / _MODELOPT_SETTINGS).exists() and "quantization_config" not in config:
        config["quantization_config"] = _read_json(folder / _MODELOPT_SETTINGS)
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            raise ModelError(f"{path} is larger than {_LARGEST_CONFIG >> 20} MiB")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object")
    return config


def _format_from_config(config: dict[str, Any]) -> WeightFormat:
    """What a config.json says of the weights; bfloat16 where it says nothing."""
    text = _text_part(config)
    dtype = str(text.get("torch_dtype") or text.get("dtype") or "bfloat16").removeprefix("torch.")
    stored = StoredQuantization.of(config).base
    dtype = dtype if dtype in FLOAT_BYTES else "bfloat16"
    return WeightFormat(dtype) if stored is None else WeightFormat(dtype, stored.bits, stored.group_size)


def _text_part(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` with the part that describes the text model of a model with several."""
    part = config.get("text_config")
    return {**config, **part} if isinstance(part, dict) else config


def _dtype_of_files(folder: Path) -> str | None:
    """The type of most floating-point values in the weight files; None where they hold another or can't be read."""
    sizes: Counter[str] = Counter()
    for path in folder.glob("model*.safetensors"):
        try:
            header, _ = read_header(path)
            for name, entry in header.items():
                if name != "__metadata__":
                    sizes[str(entry["dtype"])] += math.prod(entry["shape"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # loading will say what is wrong with the file
    floats = {dtype: size for dtype, size in sizes.items() if dtype.startswith(("F", "BF"))}
    if not floats or not floats.keys() <= _SAFETENSORS_DTYPES.keys():
        return None
    return _SAFETENSORS_DTYPES[max(floats, key=lambda dtype: floats[dtype])]


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
        linears = _linears(blocks[-1])
        adaptable = adaptable_blocks(model)
        text = _text_part(config)
        vocabulary, hidden = _embedding(model).weight.shape
        heads = int(text.get("num_attention_heads") or 1)
        head_dim = int(text.get("head_dim") or hidden // heads)
        intermediate = int(text.get("intermediate_size") or 4 * hidden)
        kv_heads = int(text.get("num_key_value_heads") or heads)
    except (KeyError, TypeError, ValueError, AttributeError, ImportError, IndexError, ZeroDivisionError) as error:
        raise ModelError(f"{source} is not the configuration of a model that mlx-lm knows: {error!r}") from error
    return ModelShape(
        hidden=hidden,
        blocks=len(blocks),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=intermediate,
        vocabulary=vocabulary,
        linears=linears,
        odd_block=next((type(block).__name__ for block in blocks if not _is_llama_like(block, linears)), None),
        active_parameters=tuple(_active_parameters(block, text) for block in blocks),
        parameters=sum(int(value.size) for _, value in tree_flatten(model.parameters())),
        adaptable=adaptable,
        checkpoint=_format_from_config(config),
        packs=may_pack(model),
        has_dropout=any(isinstance(module, nn.Dropout) and module._p_1 < 1 for module in model.modules()),
        plain_head=not any(text.get(key) for key in _OF_LOGITS),
        sizes=sizes_of(model, StoredQuantization.of(config)),
        config=config,
    )


def _linears(block: nn.Module) -> tuple[Linear, ...]:
    return tuple(
        Linear(name, int(module.weight.shape[1]), int(module.weight.shape[0]))
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    )


def _is_llama_like(block: nn.Module, linears: tuple[Linear, ...]) -> bool:
    if _linears(block) != linears or {linear.name for linear in linears} != _LLAMA_PROJECTIONS:
        return False
    holders = {
        name
        for name, module in block.named_modules()
        if not isinstance(module, nn.Linear)
        and any(isinstance(value, mx.array) and not key.startswith("_") for key, value in module.items())
    }
    return holders <= _LLAMA_NORMS


def _active_parameters(block: nn.Module, text: dict[str, Any]) -> int:
    """Parameters of the matrices of ``block`` that one token meets."""
    chosen = next((int(text[key]) for key in _EXPERTS_PER_TOKEN if isinstance(text.get(key), int)), 1)
    count = 0
    for _, value in tree_flatten(block.parameters()):
        size = int(value.size)
        count += size * min(chosen, value.shape[0]) // value.shape[0] if value.ndim == 3 else size * (value.ndim == 2)
    return count


def _embedding(model: nn.Module) -> nn.Embedding:
    """The embedding of the tokens: the largest."""
    found = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if not found:
        raise ValueError("no embedding")
    return max(found, key=lambda module: int(module.weight.size))
