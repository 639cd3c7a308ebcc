"""The headers of a model's weight files, and whether the files are as long as these say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

from macft.errors import ConfigError

# Safetensors itself allows no longer header.
_LARGEST_HEADER = 100_000_000
_POINTER = b"version https://git-lfs"


def parse_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, entries by name, and at which byte the tensors begin.

    Raises:
        OSError: the file can't be read.
        ValueError: it has no such header.
    """
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= _LARGEST_HEADER:
        raise ValueError(f"a header of {length} bytes")
    header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("a header that is not a JSON object")
    return header, 8 + length


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """As :func:`parse_header`, of the file ``path``."""
    with path.open("rb") as file:
        return parse_header(file)


def check_weight_files(folder: Path) -> None:
    """Reads the headers of the safetensors files in ``folder``.

    Weights may be read long after the start of a run, block by block, so a broken file is found before.

    Raises:
        ConfigError: a file is cut off or damaged; one line that names it.
    """
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            size = path.stat().st_size
            expected = _expected_size(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if _is_pointer(path):
                raise ConfigError(
                    f"model.path: {path} is only Git LFS's pointer to the weights; run `git lfs pull` in that folder"
                ) from error
            reason = error.strerror if isinstance(error, OSError) else "its header is damaged"
            raise ConfigError(f"model.path: {path} can't be read ({reason}); fetch or copy it again") from error
        if size != expected:
            raise ConfigError(
                f"model.path: {path} has {size:,} bytes and should have {expected:,}; fetch or copy it again"
            )


def _is_pointer(path: Path) -> bool:
    """Whether a clone of a repository has left the name of the file's contents in its place."""
    try:
        with path.open("rb") as file:
            return file.read(len(_POINTER)) == _POINTER
    except OSError:
        return False


def _expected_size(path: Path) -> int:
    header, start = read_header(path)
    ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    return start + max(ends, default=0)
