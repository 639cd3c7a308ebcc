"""A running ``macft serve``, and requests to it."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil
import pytest

from harness.runs import environment, read_line
from macft.evaluation.chat import Chat, ModelAnswers, Sampling
from macft.model.adapters.attach import attach
from macft.model.backends.choose import make_backend
from macft.model.load import load
from macft.model.settings import ModelConfig

JSON = {"Content-Type": "application/json"}
CHAT = "/v1/chat/completions"


class Served:
    """A running ``macft serve``; ``lines`` are those that it printed until it was ready."""

    def __init__(self, process: subprocess.Popen[str], lines: list[str]):
        self.process, self.lines = process, lines
        self.url = lines[-1].split(" at ")[1].split("  ")[0].removesuffix("/v1")
        self.address = (self.url.rpartition(":")[0].removeprefix("http://"), int(self.url.rpartition(":")[2]))

    def get(self, path: str, headers: dict[str, str] | None = None) -> dict[str, Any]:
        """The answer to a GET request."""
        request = urllib.request.Request(self.url + path, headers=headers or {})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return dict(json.load(answer))

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> bytes:
        """The answer to a POST request with ``body`` as JSON, or as it is if it is bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers=JSON | (headers or {}))
        with urllib.request.urlopen(request, timeout=60) as answer:
            return bytes(answer.read())

    def chat(self, question: str, **options: Any) -> dict[str, Any]:
        """The completion of one message."""
        body = {"messages": [{"role": "user", "content": question}], **options}
        return dict(json.loads(self.post(CHAT, body)))

    def text(self, question: str, **options: Any) -> str:
        """The text of :meth:`chat`."""
        return str(self.chat(question, **options)["choices"][0]["message"]["content"])

    def refusal(self, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, str]:
        """Status and message of an error; without a ``body`` to a GET request."""
        with pytest.raises(urllib.error.HTTPError) as raised:
            self.post(path, body, headers) if body is not None else self.get(path, headers)
        return raised.value.code, json.loads(raised.value.read())["error"]["message"]

    def workers(self) -> list[psutil.Process]:
        """The processes of the other ranks, in their order."""
        found = []
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.ZombieProcess, psutil.NoSuchProcess):  # it was killed
                if "macft.launch.generation.worker" in child.cmdline():
                    found.append(child)
        return found


@contextmanager
def served(*words: object, variables: dict[str, str] | None = None) -> Iterator[Served]:
    """``macft serve`` on a free port, which is interrupted at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "macft.serve", "--port", "0", *map(str, words)],
        env=environment() | (variables or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        lines: list[str] = []
        while not lines or "/v1  (Ctrl-C ends)" not in lines[-1]:
            line = read_line(process.stdout)
            assert line, process.communicate()
            lines.append(line)
        yield Served(process, lines)
        assert process.poll() is None, process.communicate()
    finally:
        process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert process.returncode == 130, errors
    assert "Traceback" not in errors, errors


def events(stream: bytes) -> list[dict[str, Any]]:
    """The events of a streamed completion, without the one that ends it."""
    lines = [line.removeprefix("data: ") for line in stream.decode().splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def answers_of_one_process(model_folder: Path, adapter_folder: Path) -> Callable[..., str]:
    """``(question, sampling, seed) -> the answer of macft generate`` of a model with an adapter."""
    loaded = load(ModelConfig(), model_folder)
    attach(loaded.model, adapter_folder)

    def answer(question: str, sampling: Sampling, seed: int = 0) -> str:
        mx.random.seed(seed)
        with make_backend(loaded.execution.padded()).installed(loaded.model):
            return "".join(Chat(ModelAnswers(loaded.model, loaded.tokenizer, sampling), loaded.tokenizer).say(question))

    return answer
