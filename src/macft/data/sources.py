"""Reads raw rows from local files and from the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from macft.data.files import READERS, one_line, quietly, read_file
from macft.data.formats import Place, RawRow
from macft.data.settings import SourceConfig
from macft.errors import DataError

SPLITS = ("train", "valid", "test")
_BUILTIN = Path(__file__).parent / "builtin"
_NAMES = {"train": ("train",), "valid": ("valid", "validation"), "test": ("test",)}
"""How the splits are called: by mlx-lm, and by most datasets of the Hub."""
_HUB_PROBE_SECONDS = 5.0
_FILES_NAMED = 5


def read_source(source: SourceConfig) -> dict[str, list[RawRow]]:
    """Raw rows by split: train, valid, test; a split that the source doesn't have is empty.

    Raises:
        DataError: The source doesn't exist or can't be read; the message names the file and line, or the id.
    """
    if source.path.startswith("builtin:"):
        return _choose(source, _read_folder(_builtin_folder(source.path), source.path))
    try:
        path = Path(source.path).expanduser()
    except RuntimeError as error:
        raise DataError(
            f"dataset.path: {source.path} is not in a home folder that exists; write ~/ for your own"
        ) from error
    if path.is_dir():
        return _choose(source, _read_folder(path, source.path))
    if path.is_file():
        return _choose(source, {"train": _read_rows(path, source.path, "train"), "valid": [], "test": []})
    if source.path.startswith(("/", "~", ".")) or path.suffix in READERS:
        raise DataError(f"dataset.path: {source.path} does not exist (looked in {path.absolute().parent})")
    return _read_hub(source)


def _choose(source: SourceConfig, splits: dict[str, list[RawRow]]) -> dict[str, list[RawRow]]:
    """Applies the source's split names and slices to local rows, as ``datasets`` does to those of the Hub."""
    if source.name:
        raise DataError(f"dataset.name: {source.path} is local and has no subset {source.name}; give its path instead")
    wanted = {split: getattr(source, f"{split}_split") for split in SPLITS}
    return {
        split: splits[split] if wanted[split] in (None, split) else _slice(splits, split, wanted[split])
        for split in SPLITS
    }


def _slice(splits: dict[str, list[RawRow]], split: str, spec: str) -> list[RawRow]:
    import datasets

    sizes = {name: len(rows) for name, rows in splits.items() if rows}
    try:
        parts = datasets.ReadInstruction.from_spec(spec).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        raise DataError(f"dataset.{split}_split: {spec} can't be taken from local rows: {one_line(error)}") from error
    return [row for part in parts for row in splits[part.splitname][part.from_ : part.to]]


def _builtin_folder(path: str) -> Path:
    folder = _BUILTIN / path.removeprefix("builtin:")
    if not (folder / "train.jsonl").is_file():
        known = sorted(f"builtin:{item.parent.name}" for item in _BUILTIN.glob("*/train.jsonl"))
        raise DataError(f"dataset.path: there is no {path}; there is {', '.join(known)}")
    return folder


def _read_folder(folder: Path, source: str) -> dict[str, list[RawRow]]:
    splits: dict[str, list[RawRow]] = {}
    for split in SPLITS:
        files = [folder / f"{name}{suffix}" for name in _NAMES[split] for suffix in READERS]
        present = [file for file in files if file.is_file()]
        if len(present) > 1:
            raise DataError(f"dataset.path: {folder} has both {present[0].name} and {present[1].name}; keep one")
        splits[split] = _read_rows(present[0], source, split) if present else []
    if not splits["train"]:
        names = {f"{name}{suffix}" for name in _NAMES["train"] for suffix in READERS}
        for item in sorted(folder.iterdir()):
            if item.name in names and not item.is_file():
                what = "a link to nothing" if item.is_symlink() and not item.is_dir() else "no file"
                raise DataError(f"dataset.path: {item} is {what}; put the file with the training rows there")
        found = sorted(item.name for item in folder.iterdir() if item.is_file())
        more = ", ..." if len(found) > _FILES_NAMED else ""
        raise DataError(
            f"dataset.path: {folder} has no train.jsonl (nor train.json, .parquet or .csv) with rows in it; "
            f"it has {', '.join(found[:_FILES_NAMED]) or 'no files'}{more}"
        )
    return splits


def _read_rows(path: Path, source: str, split: str) -> list[RawRow]:
    return [RawRow(record, Place(source, split, row, line)) for row, (record, line) in enumerate(read_file(path), 1)]


def _read_hub(source: SourceConfig) -> dict[str, list[RawRow]]:
    import datasets

    def load() -> dict[str, list[RawRow]]:
        builder = datasets.load_dataset_builder(source.path, source.name)
        builder.download_and_prepare()
        available = builder.info.splits
        valid = source.valid_split or next((name for name in _NAMES["valid"] if name in available), None)
        test = source.test_split or ("test" if "test" in available else None)
        wanted = {"train": source.train_split, "valid": valid, "test": test}
        chosen = builder.as_dataset(split={split: name for split, name in wanted.items() if name})
        return {
            split: [
                RawRow(dict(record), Place(source.path, name or split, row))
                for row, record in enumerate(chosen.get(split, ()), 1)
            ]
            for split, name in wanted.items()
        }

    hub_problem = _hub_problem(source.path)
    if hub_problem is None:
        return quietly(load, source.path)
    # A dataset in the cache needs no hub, but datasets would retry for half a minute before it looked there.
    before, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, True
    try:
        return quietly(load, source.path)
    except DataError as error:
        if not isinstance(error.__cause__, (ConnectionError, FileNotFoundError)):
            raise  # it is in the cache, and the problem is another one
        raise DataError(
            f"dataset.path: can't reach the Hugging Face Hub ({hub_problem}), and {source.path} is neither a local "
            "path nor in the cache; check the id, or give a local folder or file"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _hub_problem(name: str) -> str | None:
    """Why the Hub can't be asked for ``name``, found out within seconds; None if it can.

    Raises:
        DataError: The Hub answered that there is no such dataset, or that it is gated.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_hf_file_metadata(hf_hub_url(name, "README.md", repo_type="dataset"), timeout=_HUB_PROBE_SECONDS)
    except EntryNotFoundError:
        return None
    except GatedRepoError as error:
        raise DataError(f"dataset.path: {name} is gated; accept its terms on the hub and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise DataError(
            f"dataset.path: the Hugging Face Hub has no dataset {name}; check the id, or give a local folder or file"
        ) from error
    except Exception as error:  # the Hub client's HTTP library has changed over time, and so have its errors
        return one_line(error)
    return None
