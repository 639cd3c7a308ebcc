"""All-reduce of float32 over loopback, two processes: macft's ring and MLX's ring by turns, median of each.

    python benchmarks/allreduce.py

MLX's own all-reduce can stop for ever in rare cases (mlx issue 4475), so the whole run has a time limit.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from macft.collective.ring import Ring

SIZES = {"4 KB": 4 << 10, "1 MB": 1 << 20, "16 MB": 16 << 20, "64 MB": 64 << 20}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each size, after 3 to warm up")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds after which the benchmark gives up")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--addresses", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        measure(options.rank, options.addresses, options.rounds)
        return 0
    return launch(options.rounds, options.limit)


def launch(rounds: int, limit: float) -> int:
    """Starts both ranks; rank 0 prints the table."""
    ports = free_ports(4)
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports[2:]]))
        ranks = []
        for rank in range(2):
            command = [sys.executable, __file__, "--rank", str(rank), "--rounds", str(rounds)]
            command += ["--addresses", *(f"127.0.0.1:{port}" for port in ports[:2])]
            environment = {**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
            ranks.append(subprocess.Popen(command, env=environment))
        deadline = time.monotonic() + limit
        try:
            return max(rank.wait(max(0.1, deadline - time.monotonic())) for rank in ranks)
        except subprocess.TimeoutExpired:
            print(f"not done after {limit:g} s", file=sys.stderr)
            return 1
        finally:
            for rank in ranks:
                rank.kill()


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def measure(rank: int, addresses: list[str], rounds: int) -> None:
    """One rank's part. Both rings take turns in the same process, so that disturbances hit both alike."""
    import mlx.core as mx

    group = mx.distributed.init(strict=True, backend="ring")
    with Ring(rank, 2, addresses) as ring:
        if rank == 0:
            print(f"{'size':>6} {'macft ms':>9} {'mlx ms':>9}", flush=True)
        for name, size in SIZES.items():
            ours, theirs = np.zeros(size // 4, np.float32), mx.zeros(size // 4)
            mx.eval(theirs)
            calls: list[Callable[[], None]] = [
                lambda array=ours: ring.all_reduce([array]),
                lambda array=theirs: mx.eval(mx.distributed.all_sum(array, group=group, stream=mx.cpu)),
            ]
            seconds: list[list[float]] = [[], []]
            for turn in range(rounds + 3):
                for call, found in zip(calls, seconds, strict=True):
                    ring.barrier()
                    started = time.perf_counter()
                    call()
                    if turn >= 3:
                        found.append(time.perf_counter() - started)
            if rank == 0:
                medians = [statistics.median(found) * 1000 for found in seconds]
                print(f"{name:>6} {medians[0]:9.2f} {medians[1]:9.2f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
