"""Starts the other ranks of a cluster that answers, and meets them."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from typing import IO

from macft.collective.base import Collective
from macft.collective.settings import CollectiveConfig
from macft.config.yaml import package_versions
from macft.device.blas import available_cores
from macft.errors import CollectiveError, LaunchError, RendezvousError
from macft.launch.answering_worker import WorkerRequest, elastic_ring
from macft.rendezvous.server import RendezvousServer

_ANY_PORT_HERE = "127.0.0.1:0"
_END_SECONDS = 5.0
_LOG_LINES = 3


@contextmanager
def local_cluster(nodes: int, settings: CollectiveConfig, *, timeout: float) -> Iterator[Collective]:
    """``nodes`` ranks on this machine, of which this process is rank 0; the others are its children.

    Raises:
        LaunchError: a rank ended, with what it said last.
        CollectiveError: the ranks do not come together.
    """
    run_id = secrets.token_hex(8)
    with ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(nodes - 1)]
        server = RendezvousServer(
            _ANY_PORT_HERE, world_size=nodes, run_id=run_id, must_match=package_versions(), timeout=timeout
        )
        stack.callback(server.close)
        server.start()
        requests = [
            WorkerRequest(
                server=server.address,
                rank=rank,
                world_size=nodes,
                run_id=run_id,
                name=f"local-{rank}",
                bind=_ANY_PORT_HERE,
                member_bind=_ANY_PORT_HERE,
                ring_bind=_ANY_PORT_HERE,
                timeout=timeout,
                secret="",
                machine_share=1 / nodes,
                collective=asdict(settings),
            )
            for rank in range(nodes)
        ]
        workers = [_start(request, log) for request, log in zip(requests[1:], logs, strict=True)]
        stack.callback(_end, workers)
        try:
            yield elastic_ring(requests[0], stack)
        except (CollectiveError, RendezvousError) as error:
            raise _with_last_words(error, workers, logs) from error


def _start(request: WorkerRequest, log: IO[bytes]) -> subprocess.Popen[bytes]:
    threads = max(1, available_cores() // request.world_size)
    worker = subprocess.Popen(
        [sys.executable, "-m", "macft.launch.answering_worker"],
        env={**os.environ, "OPENBLAS_NUM_THREADS": str(threads)},
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches the leader only, which ends the others
    )
    assert worker.stdin is not None
    with suppress(BrokenPipeError):
        worker.stdin.write(request.to_line())
        worker.stdin.flush()
    return worker


def _end(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        assert worker.stdin is not None
        with suppress(BrokenPipeError):
            worker.stdin.close()  # it ends with that
        try:
            worker.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def _with_last_words(
    error: Exception, workers: Sequence[subprocess.Popen[bytes]], logs: Sequence[IO[bytes]]
) -> Exception:
    for rank, (worker, log) in enumerate(zip(workers, logs, strict=True), 1):
        if worker.poll() not in (None, 0):
            log.seek(0)
            lines = log.read().decode(errors="replace").strip().splitlines()[-_LOG_LINES:]
            return LaunchError(f"rank {rank} ended with status {worker.returncode}: {' | '.join(lines) or 'no output'}")
    return error
