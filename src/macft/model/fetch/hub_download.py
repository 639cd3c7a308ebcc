"""Downloads a model from the Hugging Face Hub in a process of its own, ``python -m macft.model.fetch.hub_download``.

The hub's client downloads in threads, and Python waits for these before it ends: minutes after Ctrl-C. A process can be
ended at any time. What it has fetched by then stays in the cache, and the next download goes on from there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from macft.errors import ModelError


def download(name: str, revision: str | None) -> Path:
    """Downloads the model; its progress is shown on standard error. Returns its folder in the hub's cache.

    Raises:
        ModelError: it can't be downloaded.
    """
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

    command = [sys.executable, "-m", "macft.model.fetch.hub_download", name, revision or "", *DEFAULT_ALLOW_PATTERNS]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        # It ends with its standard input, so that one without a parent does not go on.
        assert process.stdout is not None
        output = process.stdout.read()
        process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            print(file=sys.stderr)  # its bar has no end of line
        process.communicate()
    try:
        answer = json.loads(output)
    except ValueError:
        raise ModelError(f"model.path: the download of '{name}' ended with status {process.returncode}") from None
    if "problem" in answer:
        raise ModelError(str(answer["problem"]))
    return Path(str(answer["folder"]))


def hub_reason(name: str, revision: str | None, error: Exception) -> str:
    """Why the model can't be had, in one line that begins with the key."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    endpoint, start = constants.ENDPOINT, f"model.path: '{name}'"
    match error:
        case GatedRepoError():
            return f"{start} is gated: accept its licence at {endpoint}/{name}, then log in or set HF_TOKEN"
        case RepositoryNotFoundError():
            return f"{start} doesn't exist on {endpoint}, or it is private and HF_TOKEN isn't set"
        case RevisionNotFoundError():
            return f"model.revision: '{name}' has no revision '{revision}'"
        case EntryNotFoundError() if not isinstance(error, LocalEntryNotFoundError):
            return f"{start} has no config.json on {endpoint}, so mlx-lm can't load it"
    error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"{start} is not on this machine and can't be fetched from {endpoint} ({reason}); give a local "
        "folder, use model=smollm2-135m, or set HF_ENDPOINT to a mirror you can reach"
    )


def main(argv: Sequence[str]) -> None:
    """Downloads a model and prints its folder, or the problem, as JSON. ``argv``: name, revision, patterns of files."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this process
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    from huggingface_hub import snapshot_download

    name, revision = argv[0], argv[1] or None
    try:
        answer = {"folder": snapshot_download(name, revision=revision, allow_patterns=list(argv[2:]))}
    # The Hub client passes on errors of its HTTP library, which has changed over time.
    except Exception as error:
        answer = {"problem": hub_reason(name, revision, error)}
    print(json.dumps(answer), flush=True)


def _end_with_parent() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
