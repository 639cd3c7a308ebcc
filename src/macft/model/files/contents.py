"""What a model's folder holds, as short texts that are equal on two machines only if the contents are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from macft.errors import ModelError
from macft.model.fetch.bundled import source_of
from macft.model.files.digests import file_digests

_WEIGHTS = "model*.safetensors"
_CONFIGURATION = ("config.json", "generation_config.json", "hf_quant_config.json", "*.py")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
)
_WITHOUT_EFFECT = ("_name_or_path", "name_or_path", "transformers_version", "chat_template")
"""Top-level keys of JSON files: where a model came from. A chat template has a text of its own."""
_SHOWN = 16


def model_contents(folder: Path, *, cache_dir: Path | None = None) -> dict[str, str]:
    """Texts for ``folder``'s weights, configuration (with its Python code) and tokenizer, by these names.

    A bundled model, which each machine converts itself, is what it was converted from: the conversion doesn't write
    the same bytes everywhere.

    Args:
        cache_dir: Where digests of large files are kept, instead of macft's folder in the user's cache.

    Raises:
        ModelError: A file can't be read.
    """
    weights = sorted(folder.glob(_WEIGHTS))
    configuration, tokenizer = _files(folder, _CONFIGURATION), _files(folder, _TOKENIZER)
    try:
        digests = dict(zip(weights, file_digests(weights, cache_dir=cache_dir), strict=True))
        source = source_of(folder, {path.name: digest for path, digest in digests.items()})
        size = sum(path.stat().st_size for path in weights)
        return {
            "model weights": source or f"{_files_of(size, len(weights))} ({_combined(digests)})",
            "model configuration": source or _combined({path: _meaning(path) for path in configuration}),
            "tokenizer": source or _combined({path: _meaning(path) for path in tokenizer}),
        }
    except OSError as error:
        raise ModelError(f"model.path: {error.filename or folder} can't be read: {error.strerror or error}") from error


def template_contents(tokenizer: Any, time: str | None) -> str:
    """A text for the chat template of ``tokenizer``, with the ``time`` that it shows; see ``dataset.template_time``.

    ``time`` is None for a template that shows none.
    """
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(json.dumps([template, time], sort_keys=True).encode()).hexdigest()[:_SHOWN]


def _files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _files_of(size: int, count: int) -> str:
    return f"{count} {'file' if count == 1 else 'files'} of {size} bytes"


def _combined(digests: dict[Path, str]) -> str:
    """One digest of files' names and digests."""
    listed = sorted((path.name, digest) for path, digest in digests.items())
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:_SHOWN]


def _meaning(path: Path) -> str:
    """A digest of a small file; of JSON without white space, order and :data:`_WITHOUT_EFFECT`."""
    data = path.read_bytes()
    if path.suffix == ".json" and path.name != "tokenizer.json":
        try:
            values = json.loads(data)
            kept = {key: value for key, value in values.items() if key not in _WITHOUT_EFFECT}
            data = json.dumps(kept, sort_keys=True).encode()
        except (ValueError, AttributeError, RecursionError):
            pass  # not an object: compared as it is
    return hashlib.sha256(data).hexdigest()
