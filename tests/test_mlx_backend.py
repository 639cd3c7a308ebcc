"""The collective over MLX's communication: the ring's semantics in real processes, and an end where MLX has none."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.runs import environment, losses, read_line, train, uneven_dataset
from macft.collective.mlx.health import Health, HealthServer, ask
from macft.collective.settings import CollectiveConfig, problems
from macft.rendezvous.server import RendezvousServer

# A rank: SERVER RANK RANKS SETTINGS, then a Python program that has `group` and `np`.
RANK = """
import json, sys, time
import numpy as np
from macft.rendezvous.connect import RankConfig, connect
from macft.collective.settings import CollectiveConfig
from macft.errors import CollectiveError

server, rank, ranks, settings, program = sys.argv[1:]
try:
    config = CollectiveConfig(backend="mlx", timeout=90.0)
    joining = RankConfig(server, int(rank), int(ranks), run_id="t", must_match={}, name=f"node-{rank}", timeout=90.0)
    with connect(joining, config) as group:
        vars(config).update(json.loads(settings))  # once all are there, which on a busy machine may take long
        exec(program)
except CollectiveError as error:
    print(type(error).__name__, error, flush=True)
    sys.exit(1)
"""
PATIENT = 120


@contextlib.contextmanager
def ranks(count: int, program: str, **settings: float) -> Iterator[list[subprocess.Popen[str]]]:
    """``count`` processes that run ``program`` with a ``group``; whatever is left of them is ended."""
    server = RendezvousServer(world_size=count, run_id="t", must_match={}, timeout=90.0)
    server.start()
    processes = []
    try:
        for rank in range(count):
            arguments = [server.address, str(rank), str(count), json.dumps(settings), program]
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", RANK, *arguments],
                    env=environment(),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()
        server.close()


def output(process: subprocess.Popen[str]) -> str:
    """What a rank printed, once it has ended in order."""
    printed, errors = process.communicate(timeout=PATIENT)
    assert process.returncode == 0, printed + errors
    return printed


SEMANTICS = """
def mine(rank, size, dtype):
    return np.random.default_rng([rank, size]).standard_normal(size).astype(dtype)

bits = []
sizes = [0, 1, group.world_size, 1000, 100_003, 5_000_001]
for dtype, most in (("f4", 10_000_000), ("f8", 200_000)):
    for size in (size for size in sizes if size < most):
        array = mine(group.rank, size, dtype)
        group.all_reduce([array])
        expected = sum(mine(rank, size, dtype).astype("f8") for rank in range(group.world_size))
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-5)
        bits.append(array.tobytes())
several = [np.full((3, 2), group.rank + 1, "f4"), np.full(5, 1, "f8"), np.full(70_000, 2, "f4"), np.empty(0, "f4")]
group.all_reduce(several)
n = group.world_size
assert [float(a.sum()) for a in several] == [3 * n * (n + 1), 5 * n, 140_000 * n, 0]
import mlx.core as mx
for dtype in (mx.float16, mx.bfloat16, mx.float32):
    array = mx.full((3, 5), group.rank + 0.5, dtype)
    mx.eval(array)
    group.all_reduce([array])
    assert array.tolist() == [[n * n / 2] * 5] * 3
bad = np.array([np.inf if group.rank else -np.inf, 3e38], np.float32)
group.all_reduce([bad])
assert np.isnan(bad[0]) and np.isinf(bad[1])
for wrong in (np.ones(4, np.int64), np.ones((4, 4), np.float32).T[1:], np.ones(2, ">f4")):
    try:
        group.all_reduce([np.ones(2, np.float32), wrong])
    except ValueError as error:
        assert "array 1 is" in str(error)
    else:
        raise AssertionError
blobs = [bytes([rank]) * (300_000 * rank) for rank in range(n)]
assert group.all_gather(blobs[group.rank]) == blobs
assert group.all_gather(b"") == [b""] * n
for root in range(n):
    assert group.broadcast(blobs[group.rank], root) == blobs[root]
group.barrier()
everyone = group.all_gather(b"".join(bits))
assert len(set(everyone)) == 1
"""


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_semantics_are_the_rings(count: int) -> None:
    with ranks(count, SEMANTICS) as processes:
        for process in processes:
            output(process)


def ends(processes: list[subprocess.Popen[str]], rank: int) -> str:
    """The error a rank ends with."""
    printed, errors = processes[rank].communicate(timeout=PATIENT)
    assert processes[rank].returncode == 1, printed + errors
    return printed.splitlines()[-1]


@pytest.mark.slow
def test_a_killed_rank_is_named_by_all() -> None:
    program = "group.barrier(); print('in', flush=True); time.sleep(600 * (group.rank == 1)); group.barrier()"
    with ranks(3, program) as processes:
        assert read_line(processes[1].stdout) == "in\n"
        processes[1].kill()
        for rank in (0, 2):
            assert ends(processes, rank).startswith("PeerLost")


@pytest.mark.slow
def test_a_stopped_rank_is_named() -> None:
    program = "group.barrier(); print('in', flush=True); time.sleep(600 * (group.rank == 1)); group.barrier()"
    with ranks(2, program, timeout=3.0) as processes:
        assert read_line(processes[1].stdout) == "in\n"
        processes[1].send_signal(signal.SIGSTOP)
        told = ends(processes, 0)
        assert told.startswith("PeerTimeout")
        assert "rank 1 (node-1" in told
        assert "silent" in told


@pytest.mark.slow
def test_a_rank_that_computes_too_long_is_named() -> None:
    program = "group.barrier(); time.sleep(600 * (group.rank == 1)); group.barrier()"
    with ranks(2, program, timeout=3.0, patience=4.0) as processes:
        told = ends(processes, 0)
        assert told.startswith("PeerTimeout")
        assert "rank 1 (node-1" in told
        assert "collective.patience" in told


# MLX waits for a part that nobody sends, as when its ring hangs.
HANG = """
import mlx.core as mx
def wait():
    mx.eval(mx.distributed.recv((4,), mx.float32, 1 - group.rank, group=group._group, stream=mx.cpu))
group.barrier()
group._call_mlx({doing}, wait)
"""


@pytest.mark.slow
def test_a_hang_of_mlx_is_told_from_a_slow_peer() -> None:
    with ranks(2, HANG.format(doing="'all-reduce 2 of 16 bytes'"), timeout=3.0) as processes:
        told = [ends(processes, rank) for rank in range(2)]
    assert all(line.startswith("PeerTimeout") and "hangs" in line for line in told), told


@pytest.mark.slow
def test_ranks_that_hang_out_of_step_are_told_so() -> None:
    with ranks(2, HANG.format(doing="f'all-reduce 2 of {16 + group.rank} bytes'"), timeout=20.0) as processes:
        told = [ends(processes, rank) for rank in range(2)]
    assert all(line.startswith("ProtocolError") for line in told), told
    # Whichever sees it first tells the other.
    assert all(
        re.search(r"is at all-reduce 2 of 1. bytes, this rank at all-reduce 2 of 1. bytes", line) for line in told
    )


@pytest.mark.slow
def test_a_rank_that_fails_by_itself_tells_the_others_why() -> None:
    program = "group.barrier()\nif group.rank: raise ArithmeticError('loss is not finite')\ngroup.barrier()"
    with ranks(2, program) as processes:
        told = ends(processes, 0)
        assert told.startswith("PeerLost")
        assert "loss is not finite" in told


@pytest.mark.slow
def test_a_group_that_does_not_come_together_ends_in_time() -> None:
    """MLX waits for the others with Python's lock held, so nothing in this process could end it."""
    program = """
from macft.collective.mlx.group import MlxListener
from macft.collective.settings import CollectiveConfig
here, gone = (MlxListener("127.0.0.1:0", CollectiveConfig(backend="mlx", timeout=3.0, heartbeat=1.0)) for _ in range(2))
gone.close()
here.join(0, [here.address, gone.address], names=[], secret="")
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=PATIENT, check=False)
    assert done.returncode != 0
    assert "MLX's group did not form within 3 s" in done.stderr or "MLX can't form its group" in done.stderr


def test_a_health_report_of_another_run_is_rejected() -> None:
    server = HealthServer("127.0.0.1:0", lambda: Health(rank=1, operation=7))
    server.secret = "ours"
    try:
        assert ask(server.address, "ours") == Health(rank=1, operation=7)
        assert ask(server.address, "theirs") == "strange"
    finally:
        server.close()
    assert ask(server.address, "ours") == "ended"


def test_settings() -> None:
    assert problems(CollectiveConfig(backend="mlx", mlx_backend="ring")) == []
    assert "collective.mlx_backend: 'tcp'" in problems(CollectiveConfig(backend="mlx", mlx_backend="tcp"))[0]
    assert "only collective=mlx" in problems(CollectiveConfig(mlx_backend="ring"))[0]


@pytest.mark.slow
def test_the_loss_curve_is_the_rings_also_under_mlx_launch(tmp_path: Path, tiny_model_folder: Path) -> None:
    data = uneven_dataset(tmp_path / "data")
    common = [f"model={tiny_model_folder}", f"dataset={data}", "training.steps=3", "training.batch_size=4"]
    common += ["training.eval_every=0", "report.tensorboard=false"]
    for backend in ("ring", "mlx"):
        topology = ["topology=local", "topology.nodes=2", f"collective={backend}"]
        done = train(*common, *topology, f"hydra.run.dir={tmp_path / backend}", cwd=tmp_path)
        assert done.status == 0, done.errors
    launcher = shutil.which("mlx.launch", path=str(Path(sys.executable).parent))
    assert launcher is not None
    command = [launcher, "-n", "2", "--backend", "ring", "--", sys.executable, "-m", "macft.train", *common]
    launched = subprocess.run(
        [*command, "collective=mlx", f"hydra.run.dir={tmp_path / 'launched'}"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert launched.returncode == 0, launched.stdout + launched.stderr
    for other in ("mlx", "launched"):
        assert losses(tmp_path / other) == pytest.approx(losses(tmp_path / "ring"), rel=1e-5)
