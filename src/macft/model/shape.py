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
from macft.model.adaptable import AdaptableBlock, adaptable_blocks
from macft.model.ends import BOTH_ENDS, find_ends
from macft.model.execution import FLOAT_BYTES, WeightFormat
from macft.model.packable import may_pack
from macft.model.weight_files import read_header

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
# Bits and group size of formats whose settings give their names only, as mlx-lm reads them.
_QUANTIZATION_METHODS = {"mxfp4": (4, 32), "mxfp8": (8, 32), "modelopt": (4, 16)}


@dataclass(frozen=True)
class Linear:
    """A linear layer of a block: its name in the block and its dimensions."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder. ``parameters`` counts all blocks, embeddings and head; ``active_parameters`` those of the
    blocks' matrices that one token meets, which of a mixture are those of its experts.

    ``odd_block`` names the class of a block that isn't one of the Llama kind: q, k, v, o, gate, up and down
    projections, of the same sizes in all blocks, and two norms, with perhaps one each for queries and keys. It is None
    where all blocks are of that kind, and ``linears`` are then those of each; ``heads`` and what follows are of use
    only there.
    ``config`` is the content of config.json.
    ``adaptable`` are the layers that may be trained, block by block. ``checkpoint`` is how the files hold the weights.
    ``packs``: it is built as packed rows need it. ``has_dropout``: it drops elements of its own.
    ``plain_head``: logits are a product, not scaled or capped. ``block_share``: the part of the parameters that is in
    blocks; ``end_shares``: those that only the ends named (:mod:`~macft.model.ends`) use.
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
    active_parameters: int
    # Parameters of matrices that a quantised checkpoint holds in few bits: linear layers and embeddings.
    matrix_parameters: int
    adaptable: tuple[AdaptableBlock, ...]
    checkpoint: WeightFormat
    packs: bool
    has_dropout: bool
    plain_head: bool
    block_share: float
    end_shares: tuple[tuple[frozenset[str], float], ...] = ()
    config: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def outside_share(self, ends: Collection[str] = BOTH_ENDS) -> float:
        """The part of the parameters that a node holds outside of the blocks, where it computes ``ends``."""
        return 1 - self.block_share - sum(share for users, share in self.end_shares if not users & set(ends))

    @property
    def embedding_parameters(self) -> int:
        """Size of one embedding or head matrix."""
        return self.vocabulary * self.hidden

    @property
    def block_parameters(self) -> int:
        """Parameters of a block's matrices that one token meets, on average."""
        return self.active_parameters // self.blocks

    def checkpoint_bytes(self) -> float:
        """Size of the weights as the checkpoint's files hold them."""
        return self.weight_bytes(self.checkpoint)

    def weight_bytes(self, weights: WeightFormat) -> float:
        """Size of the weights held as ``weights``; scale and bias of a quantised group are 2 bytes each."""
        if weights.bits is None:
            return float(self.parameters * weights.float_bytes)
        others = self.parameters - self.matrix_parameters
        return self.matrix_parameters * (weights.bits / 8 + 4 / weights.group_size) + others * weights.float_bytes


def read_shape(folder: Path) -> ModelShape:
    """The shape of the model in ``folder``, from its config.json and the headers of its weight files alone.

    Raises:
        ModelError: no config.json, or not one of an architecture that mlx-lm knows.
    """
    shape = shape_of(_read_config(folder), str(folder / "config.json"))
    return replace(shape, checkpoint=read_weight_format(folder))


def read_weight_format(folder: Path) -> WeightFormat:
    """How the checkpoint in ``folder`` holds its weights; of a model that :func:`read_shape` doesn't know, too.

    Raises:
        ModelError: no config.json.
    """
    config = _read_config(folder)
    if (folder / _MODELOPT_SETTINGS).exists() and "quantization_config" not in config:
        config["quantization_config"] = _read_json(folder / _MODELOPT_SETTINGS)
    weights = _format_from_config(config)
    return replace(weights, dtype=_dtype_of_files(folder) or weights.dtype)


def _read_config(folder: Path) -> dict[str, Any]:
    return _read_json(folder / "config.json")


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
    settings = config.get("quantization") or config.get("quantization_config") or text.get("quantization_config")
    bits, group_size = _bits_and_group_size(settings if isinstance(settings, dict) else {})
    return WeightFormat(dtype if dtype in FLOAT_BYTES else "bfloat16", bits, group_size)


def _bits_and_group_size(settings: dict[str, Any]) -> tuple[int | None, int]:
    """Of a config.json's ``quantization`` or ``quantization_config``, as mlx-lm reads it; (None, 64) for floats."""
    from mlx_lm.utils import _compressed_tensors_quantization

    method = settings.get("quant_method")
    if method == "bitnet":
        return None, 64
    if method == "compressed-tensors":
        try:
            settings = _compressed_tensors_quantization(settings)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return None, 64  # loading will say that it can't be read
    if method == "fp8" and settings.get("scale_fmt") == "ue8m0":
        return 8, 32
    bits, group_size = _QUANTIZATION_METHODS.get(str(method), (settings.get("bits"), settings.get("group_size") or 64))
    try:
        return (int(bits), int(group_size)) if bits else (None, 64)
    except (TypeError, ValueError):
        return None, 64


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
    parameters = dict(tree_flatten(model.parameters()))
    sizes = [(value.ndim, int(value.size)) for value in parameters.values()]
    total = sum(size for _, size in sizes)
    in_blocks = sum(int(value.size) for block in blocks for _, value in tree_flatten(block.parameters()))
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
        active_parameters=sum(_active_parameters(block, text) for block in blocks),
        parameters=total,
        block_share=in_blocks / max(1, total),
        end_shares=tuple(
            (part.ends, sum(int(parameters[name].size) for name in part.names) / max(1, total))
            for part in find_ends(model)
        ),
        matrix_parameters=sum(size for dimensions, size in sizes if dimensions > 1),
        adaptable=adaptable,
        checkpoint=_format_from_config(config),
        packs=may_pack(model),
        has_dropout=any(isinstance(module, nn.Dropout) and module._p_1 < 1 for module in model.modules()),
        plain_head=not any(text.get(key) for key in _OF_LOGITS),
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
