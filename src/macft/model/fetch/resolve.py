"""Finds a model's folder: bundled, local, or from the Hugging Face Hub."""

from __future__ import annotations

import difflib
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path

from macft.errors import ModelError
from macft.model.fetch.bundled import BUNDLED, ensure_bundled
from macft.model.fetch.hub_download import download, hub_reason
from macft.model.settings import ModelConfig

# Seconds for the Hub to answer before a download, which may be gigabytes, starts.
_PROBE_SECONDS = 8.0

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}", re.ASCII)


def resolve(config: ModelConfig, *, cache_dir: Path | None = None) -> Path:
    """The local folder of the model that ``config.path`` names, which is downloaded if necessary.

    ``config.path`` is, in this order, a bundled model's name, an existing folder or a Hugging Face id. A model that is
    complete in the Hugging Face cache is used without asking the Hub.

    Args:
        cache_dir: Where bundled models are, instead of macft's folder in the user's cache.

    Raises:
        ModelError: There is no such model, its folder lacks files, or it can't be downloaded.
    """
    name = config.path
    if name in BUNDLED:
        return ensure_bundled(BUNDLED[name], cache_dir=cache_dir)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if problem := _incomplete(folder):
            raise ModelError(f"model.path: folder '{name}' {problem}")
        return folder
    _check_hub_id(name)
    return _from_hub(name, config.revision)


def fetch_config(config: ModelConfig) -> Path:
    """The folder in the hub's cache with the config.json of a model that is not on this machine.

    Nothing else is fetched.

    Raises:
        ModelError: There is no such model, or the hub doesn't answer.
    """
    from huggingface_hub import hf_hub_download

    name, revision = config.path, config.revision
    _check_hub_id(name)
    _probe(name, revision)
    try:
        return Path(hf_hub_download(name, "config.json", revision=revision)).parent
    except Exception as error:
        raise ModelError(hub_reason(name, revision, error)) from error


def is_hub_id(name: str) -> bool:
    """Whether it has the form of a Hugging Face id, ``org/name``."""
    return _HUB_ID.fullmatch(name) is not None and "--" not in name and ".." not in name


def _check_hub_id(name: str) -> None:
    """Raises ModelError unless ``name``, which is no folder, may be an id of the hub."""
    folder = Path(name).expanduser()
    if folder.is_file():
        raise ModelError(f"model.path: '{name}' is a file; give the folder with config.json and the weights")
    if _looks_like_path(name):
        raise ModelError(f"model.path: folder '{name}' doesn't exist{_nearest_sibling(folder)}")
    if "/" not in name:
        raise ModelError(
            f"model.path: '{name}' is neither a bundled model ({', '.join(BUNDLED)}), nor a folder, "
            f"nor a Hugging Face id (org/name){_did_you_mean(name, list(BUNDLED))}"
        )
    if not is_hub_id(name):
        raise ModelError(f"model.path: '{name}' is not a Hugging Face id: org/name in letters, digits, -_.")


def _incomplete(folder: Path) -> str | None:
    """Which files a model folder lacks, as the rest of a sentence; None if it has all that mlx-lm looks for."""
    if not (folder / "config.json").is_file():
        return "has no config.json"
    try:
        is_object = isinstance(json.loads((folder / "config.json").read_text(encoding="utf-8")), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        return "has a config.json that is no JSON object; fetch or copy it again"
    present = {path.name for path in folder.glob("model*.safetensors")}
    if not present:
        return "has no model*.safetensors"
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        shards = set(index["weight_map"].values())
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        return "has an unreadable model.safetensors.index.json"
    # A converted model sometimes has the index of the original files, which doesn't describe its own.
    missing = sorted(shards - present) if shards & present else []
    return f"lacks {len(missing)} of {len(shards)} weight files, {missing[0]} for one" if missing else None


def _looks_like_path(name: str) -> bool:
    first = Path(name).parts[0] if name else ""
    return name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or Path(first).is_dir()


def _nearest_sibling(folder: Path) -> str:
    if not folder.parent.is_dir():
        return f", and neither does '{folder.parent}'"
    return _did_you_mean(folder.name, [path.name for path in folder.parent.iterdir() if path.is_dir()])


def _did_you_mean(name: str, choices: list[str]) -> str:
    close = difflib.get_close_matches(name.lower(), choices, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

    try:
        cached = Path(
            snapshot_download(name, revision=revision, allow_patterns=DEFAULT_ALLOW_PATTERNS, local_files_only=True)
        )
        if _incomplete(cached) is None:
            return cached
    except LocalEntryNotFoundError:
        pass
    _probe(name, revision)
    folder = download(name, revision)
    if problem := _incomplete(folder):
        raise ModelError(f"model.path: '{name}' on {constants.ENDPOINT} {problem}, so mlx-lm can't load it")
    return folder


def _probe(name: str, revision: str | None) -> None:
    """Asks the hub once for the model's config.json; its client would try for half a minute to reach it.

    Raises:
        ModelError: There is none, or no answer.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(name, "config.json", revision=revision)
    try:
        _within(_PROBE_SECONDS, lambda: get_hf_file_metadata(url, timeout=_PROBE_SECONDS / 2))
    # The Hub client passes on errors of its HTTP library, which has changed over time.
    except Exception as error:
        raise ModelError(hub_reason(name, revision, error)) from error


def _within(seconds: float, call: Callable[[], object]) -> None:
    """Runs ``call`` and waits at most ``seconds`` for it.

    The HTTP client's own timeout is not enough: it starts again for each address of a host.

    Raises:
        TimeoutError: ``call`` has not returned; its thread continues. Otherwise what ``call`` raises.
    """
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="macft-hub-probe", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:g} s")
    if raised:
        raise raised[0]
