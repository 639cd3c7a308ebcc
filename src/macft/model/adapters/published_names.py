"""What a model's layers are called in Hugging Face's transformers, concluded from a checkpoint and mlx-lm's code.

mlx-lm gives some weights other names, in the ``sanitize`` of an architecture. It is called here with arrays that hold
their own number in place of a checkpoint's weights: what comes out of it shows which name has become which.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from macft.errors import ConfigError, ModelError
from macft.model.files.weight_files import read_header

_ROWS = 2**32
_HINT = "merge it instead (python -m macft.fuse)"


def published_names(folder: Path, modules: Sequence[str]) -> dict[str, str]:
    """Names in transformers of ``modules``, linear layers of mlx-lm's model of the checkpoint in ``folder``.

    A checkpoint that mlx-lm has saved has its names. Where mlx-lm doesn't rename weights of this architecture, they are
    those of transformers too.

    Raises:
        ConfigError: a name can't be concluded.
        ModelError: the checkpoint can't be read.
    """
    config, (weights, is_from_mlx) = _config(folder), _headers(folder)
    if isinstance(config.get("text_config"), dict):
        raise ConfigError(
            f"--format: what transformers calls the layers of {config.get('model_type')}, a model with a text model "
            f"inside, depends on its version; {_HINT}"
        )
    model = _build(config, folder)
    wanted = [f"{module}.weight" for module in modules]
    if is_from_mlx:
        own = {name: value.shape for name, value in tree_flatten(model.parameters())}
        if renamed := _also_called(model, own, wanted):
            raise ConfigError(
                f"--model: {folder} has mlx-lm's names, and transformers may call {renamed[0]} {renamed[1]}; name a "
                "folder with the model as it was published"
            )
        if changed := _changed(model, own, wanted):
            raise ConfigError(
                f"--model: {folder} has mlx-lm's weights, which may be others than the published {changed}; name a "
                "folder with the model as it was published"
            )
        return {module: module for module in modules}
    sources = _sources(model, weights)
    names = {}
    for module, weight in zip(modules, wanted, strict=True):
        source = sources.get(weight)
        if source is None or not source.is_same:
            raise ConfigError(
                f"--format: {module} is no layer of its own in transformers, or a transposed one; {_HINT}"
            )
        if re.match(r"[^.]+\.\d+\.", source.name):
            raise ConfigError(
                f"--format: {folder} calls {module} {source.name}, without the name of the model around; {_HINT}"
            )
        names[module] = source.name.removesuffix(".weight")
    return names


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'} can't be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{folder / 'config.json'} is not a JSON object")
    return config


def _headers(folder: Path) -> tuple[dict[str, tuple[int, ...]], bool]:
    """Shapes of the weights in ``folder`` by name, and whether mlx-lm has saved them."""
    shapes: dict[str, tuple[int, ...]] = {}
    is_from_mlx = False
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            header, _ = read_header(path)
            is_from_mlx |= header.pop("__metadata__", {}).get("format") == "mlx"
            shapes |= {str(name): tuple(map(int, entry["shape"])) for name, entry in header.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path} can't be read: {error}") from error
    return shapes, is_from_mlx


def _build(config: dict[str, Any], folder: Path) -> nn.Module:
    """The model of ``config``, whose weights are never evaluated."""
    from mlx_lm.utils import _get_classes

    try:
        model_class, arguments = _get_classes(config)
        model: nn.Module = model_class(arguments.from_dict(config))
    except (KeyError, TypeError, ValueError, AttributeError, ImportError, IndexError) as error:
        raise ModelError(f"{folder} is not a model that mlx-lm knows: {error!r}") from error
    return model


@dataclass(frozen=True)
class _Source:
    """The weight of a checkpoint that a model's weight is made of; ``is_same``: it is that weight as it is."""

    name: str
    is_same: bool


def _sources(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, _Source]:
    """Where the matrices of ``model`` come from in a checkpoint with these ``shapes``, by name.

    A weight is filled with its number, and in each row the row's; broadcast, so that none of it takes memory.
    """
    names = list(shapes)
    weights = {name: _tagged(number, shapes[name]) for number, name in enumerate(names)}
    if hasattr(model, "sanitize"):
        try:
            weights = dict(model.sanitize(dict(weights)))
        except Exception:  # the code of an architecture, with weights that it may not expect
            return {}
    found = {}
    for name, value in weights.items():
        if value.ndim != 2 or value.dtype != mx.int64:
            continue
        number, row = (int(part) for part in divmod(int(np.array(value[-1, 0])), _ROWS))
        if number < len(names):
            is_same = row == value.shape[0] - 1 and value.shape == shapes[names[number]]
            found[name] = _Source(names[number], is_same)
    return found


def _tagged(number: int, shape: tuple[int, ...]) -> mx.array:
    rows = mx.arange(shape[0] if shape else 1, dtype=mx.int64) + number * _ROWS
    return mx.broadcast_to(rows.reshape(-1, *[1] * (len(shape) - 1)) if shape else rows[0], shape)


def _also_called(model: nn.Module, own: Mapping[str, tuple[int, ...]], wanted: Sequence[str]) -> tuple[str, str] | None:
    """One of the ``wanted`` weights, and another name that ``model.sanitize`` would take for it."""
    for rename in _renames(model):
        changed = {rename(name): shape for name, shape in own.items()}
        others = [rename(name) for name in wanted]
        if others == list(wanted) or len(changed) < len(own):
            continue
        sources = _sources(model, changed)
        for name, other in zip(wanted, others, strict=True):
            if name != other and name in sources and sources[name].name == other:
                return name, other
    return None


def _changed(model: nn.Module, own: Mapping[str, tuple[int, ...]], wanted: Sequence[str]) -> str | None:
    """One of the ``wanted`` weights that ``model.sanitize`` changes where those of convolutions are as in PyTorch."""
    sources = _sources(model, {name: _as_in_torch(shape) for name, shape in own.items()})
    return next((name for name in wanted if name not in sources or not sources[name].is_same), None)


def _as_in_torch(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], shape[2], shape[1]) if len(shape) == 3 else shape


def _renames(model: nn.Module) -> Iterator[Callable[[str], str]]:
    """What may undo the renaming of ``sanitize``: no first component, and pairs of strings in its code."""
    yield lambda name: name.partition(".")[2]
    pairs: dict[tuple[str, str], None] = {}
    for kind in {type(module) for module in model.modules()}:
        if "sanitize" in vars(kind):
            pairs |= dict.fromkeys(_pairs(vars(kind)["sanitize"]))
    for old, new in pairs:
        yield partial(_undo, old, new)


def _undo(old: str, new: str, name: str) -> str:
    return name.replace(new, old) if new else old + name


def _pairs(function: Any) -> Iterator[tuple[str, str]]:
    """Strings of which the code of ``function`` may put the second in the place of the first."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        candidates: list[Sequence[ast.expr | None]] = []
        if isinstance(node, ast.Call | ast.Tuple):
            candidates.append(node.args if isinstance(node, ast.Call) else node.elts)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and len(node.args) == 1:
                candidates.append([*node.args, ast.Constant("")])  # removeprefix
        elif isinstance(node, ast.Dict):
            candidates += zip(node.keys, node.values, strict=True)
        for candidate in candidates:
            texts = [part.value for part in candidate if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            if len(texts) == len(candidate) == 2 and texts[0] and texts[0] != texts[1]:
                yield texts[0], texts[1]
