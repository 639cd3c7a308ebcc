"""Starts macft as a user does, in processes, and reads what runs leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import mlx.core as mx
import numpy as np
import psutil

from macft.collective_bench.ports import free_addresses
from macft.report.growing_file import GrowingFile


@dataclass
class Finished:
    """A finished command."""

    status: int
    output: str
    errors: str


def command(*overrides: str) -> list[str]:
    """``python -m macft.train`` with ``overrides``."""
    return [sys.executable, "-m", "macft.train", *overrides]


def environment() -> dict[str, str]:
    """One BLAS thread, so that several ranks on two cores don't get in each other's way."""
    return {**os.environ, "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def train(*overrides: str, cwd: Path, timeout: float = 240) -> Finished:
    """Runs ``python -m macft.train`` to its end."""
    done = subprocess.run(
        command(*overrides), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def train_to_end(*overrides: str, folder: Path, cwd: Path | None = None, timeout: float = 240) -> Path:
    """Runs ``python -m macft.train`` with ``folder`` as its run folder, which it returns.

    Raises AssertionError with the run's errors if it fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = train(*overrides, f"hydra.run.dir={folder}", cwd=cwd or folder, timeout=timeout)
    assert done.status == 0, done.errors
    return folder


def start(*overrides: str, cwd: Path, variables: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Starts ``python -m macft.train``, with more environment ``variables``, and returns at once."""
    return subprocess.Popen(
        command(*overrides),
        cwd=cwd,
        env={**environment(), **(variables or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind in a run's metrics.jsonl; an unfinished last line is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [event for event in map(json.loads, lines) if event["type"] == kind]


def wait_for_events(process: subprocess.Popen[str], folder: Path, kind: str, count: int = 1, text: str = "") -> None:
    """Waits until the run in ``folder`` has ``count`` events of one kind, with ``text`` in theirs.

    Raises AssertionError if ``process`` ends before, or after two minutes.
    """
    deadline = time.monotonic() + 120
    file, incarnation, found = GrowingFile(folder / "metrics.jsonl"), 0, 0
    while True:
        lines = file.read()
        if file.incarnation != incarnation:
            incarnation, found = file.incarnation, 0
        found += sum(event["type"] == kind and text in event.get("text", "") for event in map(json.loads, lines))
        if found >= count:
            return
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, [log.read_text() for log in (folder / "logs").glob("*")]
        time.sleep(0.01)


def read_line(pipe: IO[Any] | None) -> str:
    """The next line of a process's output, empty at its end; the rest is left to ``communicate``.

    ``pipe.readline()`` takes from the system what has come after the line, too, and ``communicate`` never returns it.
    """
    assert pipe is not None
    line = bytearray()
    while not line.endswith(b"\n") and (byte := os.read(pipe.fileno(), 1)):
        line += byte
    return line.decode()


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int = 1) -> None:
    """Waits until the run in ``folder`` has made ``step`` steps."""
    wait_for_events(process, folder, "step_done", step)


def losses(folder: Path) -> list[float]:
    """The training loss of each step, in order; each step must stand once."""
    steps = events(folder, "step_done")
    assert [event["step"] for event in steps] == list(range(1, len(steps) + 1))
    return [event["loss"] for event in steps]


def adapter(folder: Path) -> dict[str, np.ndarray]:
    """The final adapter's arrays."""
    return {name: np.array(value) for name, value in mx.load(str(folder / "adapters" / "adapters.safetensors")).items()}


def adapter_digests(folder: Path) -> list[str]:
    """SHA-256 of the final adapter: of the file that rank 0 wrote, then as each other rank logged it."""
    digests = [json.loads((folder / "summary.json").read_text())["adapter_sha256"]]
    for log in sorted((folder / "logs").glob("rank-*.log")):
        digests += [line.split()[-1] for line in log.read_text().splitlines() if "adapter sha256" in line]
    return digests


def assert_adapters_close(folder: Path, reference: Path, *, rtol: float, atol: float) -> None:
    """The final adapters of two runs have the same arrays, up to a tolerance."""
    ours, expected = adapter(folder), adapter(reference)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value, rtol=rtol, atol=atol, err_msg=name)


def same_bits(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    """Whether two adapters are equal to the last bit."""
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def ranks(launcher: subprocess.Popen[Any]) -> dict[int, psutil.Process]:
    """The ranks' processes of a local run, by the rank that they began with."""
    found = {}
    for child in psutil.Process(launcher.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            line = child.cmdline()
            if "macft.launch.worker" in line:
                found[int(line[4])] = child
    return found


@dataclass
class Differences:
    """The largest differences between two runs of the same steps."""

    loss: float
    """Of a step's loss, relative."""
    weight: float
    """Of a weight of the final adapter, absolute."""
    matrix: float
    """Of a matrix of the final adapter, relative to its norm."""


def differences(steps: Sequence[dict[str, Any]], folder: Path, reference: Path) -> Differences:
    """Between a run and ``reference``, the one without faults.

    ``steps`` are the run's step_done events, and ``folder`` holds its adapter.
    Raises AssertionError if they are not the same steps, or one has a row too few or too many.
    """
    disturbed, expected = ({step["step"]: step for step in run} for run in (steps, events(reference, "step_done")))
    assert disturbed.keys() == expected.keys(), f"steps of one run only: {sorted(disturbed.keys() ^ expected.keys())}"
    for step, event in expected.items():  # a row that is lost or doubled would change the counts
        assert [disturbed[step][key] for key in ("tokens", "target_tokens")] == [
            event["tokens"],
            event["target_tokens"],
        ]
    ours, theirs = adapter(folder), adapter(reference)
    assert ours.keys() == theirs.keys()
    return Differences(
        loss=max(abs(disturbed[step]["loss"] - event["loss"]) / event["loss"] for step, event in expected.items()),
        weight=max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours),
        matrix=max(float(np.linalg.norm(ours[name] - theirs[name]) / np.linalg.norm(theirs[name])) for name in ours),
    )


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def uneven_dataset(folder: Path) -> Path:
    """Prompt/completion rows of very different lengths: 40 to train, 8 to validate, 6 to test."""
    words = ["red", "seven", "river", "lamp", "north", "glass", "stone", "quiet", "paper", "cloud"]
    generator = np.random.default_rng(5)

    def row() -> dict[str, str]:
        text = " ".join(generator.choice(words, int(generator.integers(1, 60))))
        return {"prompt": f"Repeat: {text}", "completion": " ".join(text.split()[: int(generator.integers(1, 30))])}

    for name, count in (("train", 40), ("valid", 8), ("test", 6)):
        write_jsonl(folder / f"{name}.jsonl", [row() for _ in range(count)])
    return folder


def on_hosts(folder: Path, count: int = 2) -> list[list[str]]:
    """The overrides of each rank of a run on ``count`` hosts that are processes on this machine.

    Each has its run's folder in ``folder``, named by its rank.
    """
    hosts = ",".join(f"127.0.0.1:{port}" for port in free_ports(count))
    return [
        ["topology=hosts", f"topology.hosts=[{hosts}]", f"topology.rank={rank}", f"hydra.run.dir={folder / str(rank)}"]
        for rank in range(count)
    ]


def free_ports(count: int) -> list[int]:
    """Free ports, each with two free ones after it."""
    return [int(address.rpartition(":")[2]) for address in free_addresses(count, in_a_row=3)]
