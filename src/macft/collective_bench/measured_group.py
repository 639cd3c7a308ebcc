"""One implementation that is measured: its ranks as processes, which may hang or fail without affecting others."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NotRequired, Self, TypedDict

import macft
from macft.errors import MacftError

_MPI = "--allow-run-as-root --oversubscribe --bind-to none --mca pml ob1 --mca btl tcp,self"
_MAX_ANSWER_BYTES = 16 * 1024 * 1024


class GroupFailed(MacftError):
    """An implementation could not be started, hung or failed; says which and how."""


class Answer(TypedDict):
    """A rank's answer; which keys it has depends on the order."""

    rank: NotRequired[int]
    joined: NotRequired[bool]
    ready: NotRequired[bool]
    sum: NotRequired[float]
    right: NotRequired[bool]
    seconds: NotRequired[list[float]]
    error: NotRequired[str]


class MeasuredGroup:
    """All ranks of implementation ``name``. While they wait for orders, they use no processor time.

    Args:
        name: One of :data:`~macft.collective_bench.sides.NAMES`.
        addresses: ``host:port`` by rank; on one machine each rank needs a port of its own.
        settings: macft's ``collective`` group, for ``macft``.
        python: The interpreter to run the ranks with; it must have the implementation's library and NumPy.
        prefixes: Words before each rank's command, by rank (``ip netns exec NAME``).
        interface: The network interface for gloo and MPI; empty for their own choice.
        environment: More variables for the processes.
        limit: Seconds that an order may take; after that the implementation counts as hung.

    Raises:
        GroupFailed: the group did not form within ``limit``.
    """

    def __init__(
        self,
        name: str,
        addresses: Sequence[str],
        *,
        settings: Mapping[str, object] | None = None,
        python: str = sys.executable,
        prefixes: Sequence[Sequence[str]] = (),
        interface: str = "",
        environment: Mapping[str, str] | None = None,
        limit: float = 60.0,
    ):
        self.name, self.ranks, self._limit = name, len(addresses), limit
        self._environment = dict(environment or {})
        self._processes: list[subprocess.Popen[bytes]] = []
        self._controls: list[socket.socket] = []
        self._buffers = [b""] * self.ranks
        self._folder = tempfile.TemporaryDirectory(prefix="macft-bench-")
        self._log = (Path(self._folder.name) / "log").open("w+b")
        specification = json.dumps({"addresses": list(addresses), "settings": dict(settings or {})})
        try:
            with socket.socket(socket.AF_UNIX) as server:
                path = str(Path(self._folder.name) / "control")
                server.bind(path)
                server.listen(self.ranks)
                for command in self._commands(
                    [python, "-m", "macft.collective_bench.worker", path], specification, prefixes, interface
                ):
                    self._processes.append(self._start(command, interface))
                self._controls = self._accept(server)
            self._answers()
        except BaseException:
            self.close()
            raise

    @property
    def process_ids(self) -> list[int]:
        """Ids of the processes started, by rank; for MPI that of mpirun only."""
        return [process.pid for process in self._processes]

    def order(self, **order: object) -> list[Answer]:
        """Sends an order to all ranks; returns their answers, by rank.

        Raises:
            GroupFailed: the group is then closed.
        """
        line = (json.dumps(order) + "\n").encode()
        try:
            for control in self._controls:
                control.sendall(line)
            return self._answers()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends all ranks. Safe to call twice."""
        for control in self._controls:
            control.close()  # a rank that works ends then
        deadline = time.monotonic() + 2.0
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if not self._log.closed:
            self._log.close()
            self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _commands(
        self, worker: list[str], specification: str, prefixes: Sequence[Sequence[str]], interface: str
    ) -> list[list[str]]:
        if self.name != "mpi":
            prefixes = prefixes or [[]] * self.ranks
            return [[*prefixes[rank], *worker, self.name, str(rank), specification] for rank in range(self.ranks)]
        if shutil.which("mpirun") is None:
            raise GroupFailed("mpi: mpirun is not installed")
        only = ["--mca", "btl_tcp_if_include", interface] if interface else []
        inside = []
        if prefixes:
            cases = [f'{rank}) exec {" ".join(prefix)} "$@";;' for rank, prefix in enumerate(prefixes)]
            inside = ["sh", "-c", f"case $OMPI_COMM_WORLD_RANK in {' '.join(cases)} esac", "sh"]
        command = ["mpirun", "-np", str(self.ranks), *_MPI.split(), *only, *inside]
        return [[*command, *worker, self.name, "mpi", specification]]

    def _start(self, command: list[str], interface: str) -> subprocess.Popen[bytes]:
        source = str(Path(macft.__file__).parents[1])
        environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        environment |= {"OMPI_MCA_mpi_yield_when_idle": "1", **self._environment}
        if interface:
            environment["GLOO_SOCKET_IFNAME"] = interface
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    def _accept(self, server: socket.socket) -> list[socket.socket]:
        by_rank: dict[int, socket.socket] = {}
        deadline = time.monotonic() + self._limit
        server.settimeout(0.2)
        while len(by_rank) < self.ranks:
            try:
                control, _ = server.accept()
            except TimeoutError:
                if time.monotonic() > deadline or any(process.poll() for process in self._processes):
                    self._raise_reported_error(by_rank)
                    raise GroupFailed(f"{self.name}: did not start{self._last_log_line()}") from None
                continue
            self._controls.append(control)
            control.settimeout(self._limit)
            by_rank[self._line(len(self._controls) - 1)["rank"]] = control
        self._buffers = [self._buffers[self._controls.index(by_rank[rank])] for rank in range(self.ranks)]
        return [by_rank[rank] for rank in range(self.ranks)]

    def _raise_reported_error(self, by_rank: Mapping[int, socket.socket]) -> None:
        """Raises the error of a rank that failed before the others had started."""
        for rank, control in by_rank.items():
            if select.select([control], [], [], 0)[0]:
                answer = self._line(self._controls.index(control))
                if "error" in answer:
                    raise GroupFailed(f"{self.name}: rank {rank}: {answer['error']}")

    def _answers(self) -> list[Answer]:
        answers = [self._line(index) for index in range(len(self._controls))]
        for rank, answer in enumerate(answers):
            if "error" in answer:
                raise GroupFailed(f"{self.name}: rank {rank}: {answer['error']}")
        return answers

    def _line(self, index: int) -> Answer:
        """The next answer over one connection. The limit applies to each; if a rank hangs, it is waited for once."""
        while b"\n" not in self._buffers[index]:
            try:
                data = self._controls[index].recv(65_536)
            except TimeoutError:
                raise GroupFailed(f"{self.name}: hung for {self._limit:g} s") from None
            if not data or len(self._buffers[index]) > _MAX_ANSWER_BYTES:
                raise GroupFailed(f"{self.name}: a rank ended{self._last_log_line()}")
            self._buffers[index] += data
        line, _, self._buffers[index] = self._buffers[index].partition(b"\n")
        answer: Answer = json.loads(line)
        return answer

    def _last_log_line(self) -> str:
        self._log.seek(0)
        lines = self._log.read()[-4000:].decode(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""
