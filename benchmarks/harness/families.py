"""A tiny random model of each family that mlx-lm ships, with a small tokenizer of its own.

    from harness.families import FAMILIES, build
    folder = build("qwen3", folder)

The weights are float32 and the same at each call. They are spread: norms differ from one and biases from zero, since a
fault that leaves out a norm or a bias would not show otherwise, and the embedding is large enough for logits to differ.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import pkgutil
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .family_configurations import CONFIGURATIONS, DENSE, VOCABULARY, Config

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
END = "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# What mlx-lm itself cannot train, or what cannot be made small: the reason, as found by trying.
NOT_TRAINED: dict[str, str] = {
    "bitnet": "mlx-lm finds no layer to adapt: its layers of ternary weights (BitLinear) have no LoRA",
    "deepseek_v41": "mlx-lm's model has no gradient: [gather_axis] Cannot calculate VJP with respect to indices",
    "muse_spark": "its attention has a Metal kernel only, which has no gradient",
    "olmo": "mlx-lm's model needs the package ai2-olmo",
    "phi3small": "mlx-lm's code adds a mask of true and false to the attention's scores, so tokens see later ones",
    "prism_hadamard_qwen35": "exists in packed 2-bit weights only, whose layers mlx-lm does not adapt",
    "recurrent_gemma": "mlx-lm's model cannot be frozen: 'Model' object has no attribute '_no_grad'",
}

# Families of which mlx-lm's default takes layers whose weight its own code reads, and fails: what is trained instead.
TARGETS: dict[str, list[str]] = {
    "gemma3n": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "kimi_k3": ["q_a_proj", "q_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
REMARKS: dict[str, str] = {
    "gear": "without blocks of kind conv_mixer, which transformers 5 refuses in a config.json",
}

FAMILIES = [name for name in CONFIGURATIONS if name not in NOT_TRAINED]


def shipped_families() -> list[str]:
    """Names of the modules of ``mlx_lm.models`` that define or import a ``Model`` with ``ModelArgs``."""
    names = []
    for module in pkgutil.iter_modules(mlx_lm.models.__path__):
        spec = importlib.util.find_spec(f"mlx_lm.models.{module.name}")
        if spec and spec.origin and "class ModelArgs" in Path(spec.origin).read_text():
            names.append(module.name)
    return sorted(names)


def configuration(name: str) -> Config:
    """The family's small config.json: only keys that its ``ModelArgs`` know, beside the type and the tokens' ids."""
    own = CONFIGURATIONS[name]
    general: Config = {"model_type": name, "bos_token_id": 0, "eos_token_id": SPECIAL_TOKENS.index(END)}
    if "text_config" in own:
        return {**general, "vocab_size": VOCABULARY, **own}
    merged = {**general, **DENSE, **own}
    _, arguments = _get_classes(merged)
    # transformers reads the last two, whatever mlx-lm does with them.
    known = inspect.signature(arguments).parameters.keys() | general.keys() | {"architectures", "layer_types"}
    return {key: value for key, value in merged.items() if key in known}


def new_model(config: Config, seed: int = 7) -> nn.Module:
    """The family's model with spread random float32 weights, the same for the same ``seed``."""
    model_class, arguments = _get_classes(config)
    mx.random.seed(seed)
    model: nn.Module = model_class(arguments.from_dict(json.loads(json.dumps(config))))
    weights = [(name, _spread(name, value)) for name, value in tree_flatten(model.parameters())]
    model.load_weights(weights)
    return model


def _spread(name: str, value: mx.array) -> mx.array:
    if not mx.issubdtype(value.dtype, mx.floating):
        return value
    leaf = name.rsplit(".", 1)[-1]
    if leaf.endswith("bias"):
        value = value + 0.05 * mx.random.normal(value.shape)
    elif "conv" in name and leaf == "weight":
        value = 0.3 * mx.random.normal(value.shape)
    elif "A_log" in name:
        pass
    elif value.ndim >= 2 and value.size > max(value.shape):
        value = mx.random.normal(value.shape) * (0.3 if "embed" in name else 1.2 / value.shape[-1] ** 0.5)
    else:
        value = value + 0.1 * mx.random.normal(value.shape)
    return value.astype(mx.float32)


def build(name: str, folder: Path, **changes: Any) -> Path:
    """Writes a model of family ``name`` into ``folder`` and returns ``folder``.

    ``changes`` replace keys of the configuration, at its top or in its ``text_config``.
    """
    config = configuration(name)
    place = config.get("text_config", config)
    place.update(changes)
    return write(config, folder)


def write(config: Config, folder: Path) -> Path:
    """Writes a model of ``config`` with the harness's tokenizer into ``folder``."""
    model = new_model(config)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(_tokenizer())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1024,
        "clean_up_tokenization_spaces": False,
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": END,
        "pad_token": SPECIAL_TOKENS[0],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


@functools.cache
def _tokenizer() -> str:
    """A byte-level BPE tokenizer, trained on rows of builtin:sql, as tokenizer.json."""
    rows = Path(__file__).parents[2] / "src/macft/data/builtin/sql/train.jsonl"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 16,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(rows.read_text().splitlines()[:200], trainer)
    return str(tokenizer.to_str())
