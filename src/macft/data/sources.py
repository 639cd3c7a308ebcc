"""Reads raw records from local files and from the Hugging Face hub."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from macft.data.settings import SourceConfig
from macft.errors import DataError

Record = dict[str, Any]
SPLITS = ("train", "valid", "test")
_BUILTIN = Path(__file__).parent / "builtin"
_LOADERS = {".json": "json", ".parquet": "parquet", ".csv": "csv"}
_HUB_PROBE_SECONDS = 8.0


def read_source(source: SourceConfig) -> dict[str, list[Record]]:
    """Raw records by split: train, valid, test; a split the source doesn't have is empty.

    Raises:
        DataError: nothing is there, or it can't be read; the message names the file and line, or the id.
    """
    if source.path.startswith("builtin:"):
        return _read_folder(_builtin_folder(source.path))
    path = Path(source.path).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        return {"train": _read_file(path), "valid": [], "test": []}
    if source.path.startswith(("/", "~", ".")) or path.suffix in (".jsonl", *_LOADERS):
        raise DataError(f"dataset.path: {source.path} does not exist (looked in {path.absolute().parent})")
    return _read_hub(source)


def _builtin_folder(path: str) -> Path:
    folder = _BUILTIN / path.removeprefix("builtin:")
    if not (folder / "train.jsonl").is_file():
        known = sorted(f"builtin:{item.parent.name}" for item in _BUILTIN.glob("*/train.jsonl"))
        raise DataError(f"dataset.path: there is no {path}; there is {', '.join(known)}")
    return folder


def _read_folder(folder: Path) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for split in SPLITS:
        files = [folder / f"{split}{suffix}" for suffix in (".jsonl", *_LOADERS)]
        present = [file for file in files if file.is_file()]
        if len(present) > 1:
            raise DataError(f"dataset.path: {folder} has both {present[0].name} and {present[1].name}; keep one")
        found[split] = _read_file(present[0]) if present else []
    if not found["train"]:
        raise DataError(f"dataset.path: {folder} has no train.jsonl (nor train.json, .parquet or .csv) with rows in it")
    return found


def _read_file(path: Path) -> list[Record]:
    if path.suffix in _LOADERS:
        return _load(
            lambda datasets: datasets.load_dataset(_LOADERS[path.suffix], data_files=str(path), split="train"),
            str(path),
        )
    return _read_jsonl(path)


def _read_jsonl(path: Path) -> list[Record]:
    records = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from error
                if not isinstance(record, dict):
                    raise DataError(f'{path}, line {number}: a row must be a JSON object such as {{"text": "..."}}')
                records.append(record)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read: {error}") from error
    return records


def _read_hub(source: SourceConfig) -> dict[str, list[Record]]:
    wanted = {"train": source.train_split, "valid": source.valid_split, "test": source.test_split}
    _require_hub(source.path)
    found: dict[str, list[Record]] = {}
    for split, name in wanted.items():
        load = partial(_load_split, source, name)
        found[split] = _load(load, source.path) if name else []
    return found


def _load_split(source: SourceConfig, split: str | None, datasets: Any) -> Any:
    return datasets.load_dataset(source.path, source.name, split=split)


def _require_hub(name: str) -> None:
    """Fails fast where the hub can't be reached; a dataset that is in the local cache needs no hub."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    cached = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"
    if cached.is_dir() or constants.HF_HUB_OFFLINE:
        return
    advice = "check the id, or give a local folder or file"
    try:
        get_hf_file_metadata(hf_hub_url(name, "README.md", repo_type="dataset"), timeout=_HUB_PROBE_SECONDS)
    except EntryNotFoundError:
        return
    except GatedRepoError as error:
        raise DataError(f"dataset.path: {name} is gated; accept its terms on the hub and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise DataError(f"dataset.path: the Hugging Face hub has no dataset {name}; {advice}") from error
    except Exception as error:  # whatever the HTTP library of the day raises
        raise DataError(
            f"dataset.path: {name} is neither a local path nor to be had from the Hugging Face hub "
            f"({type(error).__name__}); {advice}"
        ) from error


def _load(load: Callable[[Any], Any], what: str) -> list[Record]:
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        return [dict(record) for record in load(datasets)]
    except Exception as error:  # datasets raises its own, pyarrow's, fsspec's and plain ValueErrors
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"dataset.path: {what} can't be read: {reason or type(error).__name__}") from error
