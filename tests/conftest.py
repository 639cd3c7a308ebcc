"""Fixtures shared by the tests."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import settings

from harness.runs import uneven_dataset
from harness.tiny_model import make_tiny_model
from macft.device import blas
from macft.device.mlx_device import on_cpu
from macft.model.fetch.bundled import ensure_bundled
from macft.model.load import LoadedModel, load
from macft.model.settings import ModelConfig

# A background job of a shell script ignores Ctrl-C, one under nohup a closed terminal; so does what they start.
if threading.current_thread() is threading.main_thread():
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)

# No test asserts a timing: on a busy machine an example may take long.
settings.register_profile("macft", deadline=None)
settings.load_profile("macft")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest come first, so that under -n no process works on one while the others have ended."""
    slow: Counter[Path] = Counter()
    for item in items:
        limit = item.get_closest_marker("timeout")
        if item.get_closest_marker("slow") is not None:
            slow[item.path] += limit.args[0] // 60 if limit is not None else 1
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session")
def bundled_model() -> Path:
    """The folder of SmolLM2-135M-Instruct, in the user's cache; fetched the first time."""
    return ensure_bundled()


@pytest.fixture(scope="module")
def loaded(bundled_model: Path) -> LoadedModel:
    """The bundled model in float32."""
    return load(ModelConfig(precision="float32", quantization="none"), bundled_model)


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory, bundled_model: Path) -> Path:
    """A random float32 llama of 2 blocks, hidden size 64, with the first tokens of the bundled model. Read only."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny-model"), bundled_model)


@pytest.fixture(scope="session")
def tiny_task(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> list[str]:
    """Overrides for a run: the tiny model, and rows of very different lengths to train it on."""
    data = uneven_dataset(tmp_path_factory.mktemp("data"))
    return [f"model={tiny_model_folder}", f"dataset={data}", "report.samples=0"]


@pytest.fixture(params=["mlx", "cpu"])
def kernels(request: pytest.FixtureRequest) -> str:
    """Both backends: the portable one, which is what a Mac runs, and the CPU's where this machine has it."""
    if request.param == "cpu" and not (on_cpu() and blas.library() is not None):
        pytest.skip("the CPU backend is for a Linux CPU with OpenBLAS")
    return str(request.param)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Eight threads."""
    with ThreadPoolExecutor(8) as executor:
        yield executor
