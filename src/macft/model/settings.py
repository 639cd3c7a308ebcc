"""Which model to train and how to hold its weights: the Hydra group ``model``."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Optional

PRECISIONS = ("auto", "checkpoint", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("auto", "keep", "none", "4bit", "8bit")
# The group sizes MLX has kernels for.
GROUP_SIZES = (32, 64, 128)

_ABBREVIATIONS = {
    "fp32": "float32",
    "f32": "float32",
    "32": "float32",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "16": "float16",
    "bf16": "bfloat16",
    "4": "4bit",
    "int4": "4bit",
    "q4": "4bit",
    "8": "8bit",
    "int8": "8bit",
    "q8": "8bit",
    "off": "none",
    "false": "none",
}


@dataclass
class ModelConfig:
    """The Hydra group ``model``."""

    # A bundled model's name, a Hugging Face id (org/name), or a folder in mlx-lm's or Hugging Face's format.
    path: str = "smollm2-135m-instruct"
    # Branch, tag or commit of a Hugging Face id; null means its main branch.
    revision: Optional[str] = None  # noqa: UP045 (OmegaConf reads this annotation at run time)
    # Type of the weights that aren't quantised: checkpoint keeps the file's own;
    # auto is float32 on a CPU, where nothing else is fast, and checkpoint on a GPU.
    precision: str = "auto"
    # Linear and embedding weights: keep the checkpoint's, none (dequantise), 4bit or 8bit (quantise a float
    # base); auto is none on a CPU and keep on a GPU.
    quantization: str = "auto"
    # Weights that share one scale when 4bit or 8bit quantises a float base: 32, 64 or 128.
    quantization_group_size: int = 64
    # Run Python files that come with the checkpoint. Read them first.
    trust_remote_code: bool = False


def problems(config: ModelConfig) -> list[str]:
    """One line for each value that can't be right; no I/O."""
    found = []
    if not config.path.strip():
        found.append("model.path: is empty; give a bundled name, a Hugging Face id or a folder")
    if config.revision is not None and not config.revision.strip():
        found.append("model.revision: is empty; give a branch, tag or commit, or null")
    found += _not_one_of("model.precision", config.precision, PRECISIONS)
    found += _not_one_of("model.quantization", config.quantization, QUANTIZATIONS)
    if config.quantization_group_size not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES))
        found.append(f"model.quantization_group_size: {config.quantization_group_size} is not one of {sizes}")
    return found


def _not_one_of(key: str, value: str, choices: tuple[str, ...]) -> list[str]:
    if value in choices:
        return []
    meant = _ABBREVIATIONS.get(value.lower())
    if meant not in choices:
        close = difflib.get_close_matches(value.lower(), choices, n=1)
        meant = close[0] if close else None
    hint = f"; did you mean '{meant}'?" if meant else ""
    return [f"{key}: '{value}' is not one of {', '.join(choices)}{hint}"]
