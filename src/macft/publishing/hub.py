"""Uploads a folder to a repository of the Hugging Face Hub, through ``huggingface_hub``."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from macft.cli.shell import command
from macft.config.schema import TrainConfig
from macft.errors import ConfigError, LaunchError
from macft.publishing.model_card import hub_id, model_card

_OF_ADAPTER = ("adapters.safetensors", "adapter_config.json")


def check_repository(repo: str, option: str) -> None:
    """Checks what can be checked without the hub: the repository's name, and that there is a token.

    Raises:
        ConfigError: ``option`` names no repository, or nobody is logged in.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"{option}: '{repo}' can't name a repository: {' '.join(str(error).split())}") from error
    if repo.count("/") != 1:
        raise ConfigError(f"{option}: '{repo}' must be USER/NAME")
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"{option}: HF_HUB_OFFLINE is set; unset it to upload")
    if get_token() is None:
        raise ConfigError(
            f"{option}: you are not logged in; run `hf auth login`, or set HF_TOKEN to a token that may write"
        )


def push_adapter(
    adapter: Path, repo: str, *, base: str | None, config: TrainConfig | None, summary: Mapping[str, Any], private: bool
) -> str:
    """Uploads an adapter in mlx-lm's format with a model card; returns its address.

    ``adapter_config.json`` gets the base model's id on the hub in place of this machine's path.

    Raises:
        LaunchError: the hub can't be reached, or refuses.
    """
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        shutil.copyfile(adapter / _OF_ADAPTER[0], folder / _OF_ADAPTER[0])
        settings = json.loads((adapter / _OF_ADAPTER[1]).read_text(encoding="utf-8"))
        settings["model"] = base or hub_id(str(settings.get("model", ""))) or ""
        (folder / _OF_ADAPTER[1]).write_text(json.dumps(settings, indent=4) + "\n", encoding="utf-8")
        card = model_card(repo, base=base, is_adapter=True, config=config, summary=summary)
        (folder / "README.md").write_text(card, encoding="utf-8")
        return _upload(folder, repo, private=private)


def push_model(
    folder: Path, repo: str, *, base: str | None, config: TrainConfig | None, summary: Mapping[str, Any], private: bool
) -> str:
    """Uploads a whole model's ``folder``, in which it writes a model card; returns its address.

    Raises:
        LaunchError: the hub can't be reached, or refuses; the folder stays.
    """
    card = model_card(repo, base=base, is_adapter=False, config=config, summary=summary)
    (folder / "README.md").write_text(card, encoding="utf-8")
    try:
        return _upload(folder, repo, private=private)
    except LaunchError as error:
        raise LaunchError(f"{error}; the model is in {folder}: {command('hf', 'upload', repo, folder)}") from error


def _upload(folder: Path, repo: str, *, private: bool) -> str:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        made = api.create_repo(repo, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload by macft")
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise LaunchError(
                f"{constants.ENDPOINT} refuses to write {repo} (status {status}): "
                "the token must be one that may write there"
            ) from error
        raise LaunchError(f"{constants.ENDPOINT} can't take {repo}: {_first_line(error)}") from error
    except OSError as error:  # connections, too
        raise LaunchError(f"{constants.ENDPOINT} can't be reached: {_first_line(error)}") from error
    except Exception as error:
        if not type(error).__module__.startswith("http"):  # httpx or a successor, whose errors are no OSError
            raise
        raise LaunchError(f"{constants.ENDPOINT} can't be reached: {_first_line(error)}") from error
    return str(made)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
