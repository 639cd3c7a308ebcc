"""Adapters to and from the format of Hugging Face's PEFT: ``adapter_model.safetensors``, ``adapter_config.json``.

Both formats hold the same numbers. mlx-lm has ``lora_a`` (in, r) and ``lora_b`` (r, out), and adds
``scale * x @ a @ b``; PEFT has ``lora_A.weight`` (r, in) and ``lora_B.weight`` (out, r), and adds
``lora_alpha / r * B @ A @ x``, with rsLoRA ``lora_alpha / sqrt(r)`` (Kalajdzievski 2023, arXiv:2312.03732). DoRA's
magnitude (Liu et al. 2024, arXiv:2402.09353), mlx-lm's ``m`` and PEFT's ``lora_magnitude_vector``, is (out,) in both.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from macft.errors import ConfigError, ModelError
from macft.model.adapters.attach import read_adapter_config
from macft.model.adapters.files import read_tensors
from macft.model.adapters.published_names import published_names

_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_BLOCK = re.compile(r"(?P<blocks>.*\blayers)\.(?P<number>\d+)\.(?P<name>.+)")
_OURS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
_THEIRS = re.compile(r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(\.default)?(\.weight)?")
# Settings of PEFT that change more than W + scale * B @ A; they must be unset or false.
_WITHOUT_EQUIVALENT = (
    "modules_to_save rank_pattern alpha_pattern layer_replication trainable_token_indices target_parameters lora_bias "
    "fan_in_fan_out alora_invocation_tokens use_qalora use_bdlora arrow_config kasa_config "
    "monteclora_config velora_config"
).split()
# Initialisations that don't change the base model's weights; the others (pissa, olora, ...) do.
_SUPPORTED_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def export_peft(
    source: Path,
    target: Path,
    *,
    base_model: str,
    base: Path | None = None,
    alpha: float | None = None,
    rslora: bool = False,
) -> str:
    """Writes the mlx-lm adapter in ``source`` as a PEFT adapter to ``target``; returns a short description of it.

    Args:
        base_model: The value of ``base_model_name_or_path``.
        base: The base model's folder, from which the names of its layers in transformers are concluded; None: they are
            taken to be mlx-lm's.
        alpha: The adapter's alpha if it was configured with one; otherwise alpha is ``scale * rank``.
        rslora: Whether the scale is ``alpha / sqrt(rank)``.

    Raises:
        ModelError: ``source`` is not an adapter.
        ConfigError: PEFT has no equivalent of it.
    """
    config = read_adapter_config(source)
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise ConfigError(f"--format: PEFT has no equivalent of {kind} fine-tuning; use python -m macft.fuse")
    parameters = _parameters(source, config)
    rank, scale = int(parameters["rank"]), float(parameters["scale"])
    tensors: dict[tuple[str, str], mx.array] = {}
    for name, value in read_tensors(source / "adapters.safetensors").items():
        module, _, part = name.rpartition(".")
        if part not in _OURS:
            raise ConfigError(f"--format: PEFT's LoRA has no equivalent of the tensor {name}")
        if value.ndim > 2:
            raise ConfigError(
                f"--format: {module} is a mixture of experts, {value.ndim}-dimensional; PEFT has no such LoRA"
            )
        if "embed" in module.rpartition(".")[2]:
            raise ConfigError(f"--format: {module} is an embedding; only linear layers are converted")
        tensors[module, _OURS[part]] = mx.contiguous(value.T) if value.ndim == 2 else value
    modules = sorted({module for module, _ in tensors})
    names = {module: module for module in modules} if base is None else published_names(base, modules)
    weights = {f"{_PREFIX}{names[module]}.{part}": value for (module, part), value in tensors.items()}
    targets, blocks = _targets(set(names.values()))
    if alpha is None:
        alpha, rslora = scale * rank, False
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "use_rslora": rslora,
        "use_dora": kind == "dora",
        "lora_dropout": parameters.get("dropout", 0.0),
        "target_modules": targets,
        "layers_to_transform": blocks,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    _write(target, _WEIGHTS, weights, settings)
    return f"{'DoRA' if kind == 'dora' else 'LoRA'} rank {rank}, {len(modules)} modules"


def import_peft(source: Path, target: Path) -> str:
    """Writes the PEFT adapter in ``source`` as an mlx-lm adapter to ``target``; returns a short description of it.

    Raises:
        ModelError: ``source`` is not a PEFT adapter, or it is damaged.
        ConfigError: mlx-lm has no equivalent of it.
    """
    config = _peft_config(source)
    rank = int(config["r"])
    alpha = float(config.get("lora_alpha", 8))
    weights: dict[str, mx.array] = {}
    shapes: dict[str, set[str]] = {}
    for name, value in read_tensors(source / _WEIGHTS).items():
        match = _THEIRS.fullmatch(name.removeprefix(_PREFIX))
        if match is None:
            raise ConfigError(
                f"PEFT_FOLDER: the tensor {name} has no equivalent in mlx-lm; only LoRA of linear layers has"
            )
        module, part = match["module"], match["part"]
        ours = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_magnitude_vector": "m"}[part]
        if part != "lora_magnitude_vector" and (value.ndim != 2 or value.shape[part == "lora_B"] != rank):
            raise ModelError(f"{source}: {name} has shape {tuple(value.shape)}, which is not of rank {rank}")
        shapes.setdefault(module, set()).add(ours)
        weights[f"{module}.{ours}"] = mx.contiguous(value.astype(mx.float32).T)
    needed = {"lora_a", "lora_b", "m"} if config.get("use_dora") else {"lora_a", "lora_b"}
    if not shapes:
        raise ModelError(f"{source} holds no LoRA tensors")
    for module, parts in shapes.items():
        if parts != needed:
            raise ModelError(
                f"{source}: {module} must have {', '.join(sorted(needed))}, not {', '.join(sorted(parts))}"
            )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    settings = {
        "fine_tune_type": "dora" if config.get("use_dora") else "lora",
        # keys holds full paths instead: a PEFT adapter doesn't know how many blocks its model has.
        "num_layers": 0,
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": float(config.get("lora_dropout") or 0.0),
            "keys": sorted(shapes),
        },
        "model": str(config.get("base_model_name_or_path") or ""),
    }
    _write(target, "adapters.safetensors", weights, settings)
    return f"{'DoRA' if config.get('use_dora') else 'LoRA'} rank {rank}, scale {scale:g}, {len(shapes)} modules"


def _parameters(source: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict) or not {"rank", "scale"} <= parameters.keys():
        raise ModelError(f"{source / 'adapter_config.json'} has no lora_parameters with rank and scale")
    return parameters


def _targets(modules: set[str]) -> tuple[list[str], list[int] | None]:
    """PEFT's ``target_modules`` and ``layers_to_transform``: short names where these are exact, else full paths."""
    matches = [match for module in sorted(modules) if (match := _BLOCK.fullmatch(module))]
    if len(matches) == len(modules):
        numbers = sorted({int(match["number"]) for match in matches})
        names = sorted({match["name"] for match in matches})
        if len({match["blocks"] for match in matches}) == 1 and len(numbers) * len(names) == len(modules):
            short = [name.rpartition(".")[2] for name in names]
            return (short if len(set(short)) == len(short) else names), numbers
    return sorted(modules), None


def _peft_config(source: Path) -> dict[str, Any]:
    file = source / "adapter_config.json"
    if not file.is_file():
        raise ModelError(f"{source} is not a PEFT adapter: it has no adapter_config.json")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise ModelError(f"{file} is not PEFT's: it has no peft_type")
    if config["peft_type"] != "LORA":
        raise ConfigError(f"PEFT_FOLDER: peft_type {config['peft_type']} has no equivalent in mlx-lm; only LORA has")
    for key in _WITHOUT_EQUIVALENT:
        if config.get(key):
            raise ConfigError(f"PEFT_FOLDER: {key}={json.dumps(config[key])} has no equivalent in mlx-lm")
    if config.get("bias", "none") != "none":
        raise ConfigError(f"PEFT_FOLDER: bias={config['bias']} has no equivalent in mlx-lm; only none has")
    init = config.get("init_lora_weights", True)
    if init not in _SUPPORTED_INITS:
        raise ConfigError(
            f"PEFT_FOLDER: init_lora_weights={init} changed the base model's weights too; save it from PEFT with "
            "path_initial_model_for_weight_conversion first"
        )
    if not isinstance(config.get("r"), int) or config["r"] < 1:
        raise ModelError(f"{file}: r must be a whole number of 1 or more, not {config.get('r')}")
    if not (source / _WEIGHTS).is_file():
        pickled = (source / "adapter_model.bin").is_file()
        hint = "; adapter_model.bin is a pickle, which macft doesn't read: save it as safetensors" if pickled else ""
        raise ModelError(f"{source} has no {_WEIGHTS}{hint}")
    return config


def _write(folder: Path, name: str, weights: Mapping[str, mx.array], settings: Mapping[str, Any]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        mx.save_safetensors(str(folder / name), dict(weights), metadata={"format": "pt"})
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{folder} can't be written: {getattr(error, 'strerror', None) or error}") from error
