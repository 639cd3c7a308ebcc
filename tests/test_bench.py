"""The benchmark command and what it is made of: right figures, real ranks, and a hang that is told as one."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.runs import environment, read_line
from helpers.names import NASTY
from macft.bench import main
from macft.cli.run_command import run_command
from macft.collective_bench import ports
from macft.collective_bench.limits import link_speed, memory_copy
from macft.collective_bench.measured_group import GroupFailed, MeasuredGroup
from macft.collective_bench.ports import free_addresses
from macft.collective_bench.sizes import read_size, read_speed, size_text, time_text
from macft.collective_bench.turns import Measured, measure

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def bench(*arguments: str) -> subprocess.Popen[str]:
    """Starts ``python -m macft.bench``."""
    command = [sys.executable, "-m", "macft.bench", *arguments]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@given(st.integers(1, 1 << 38))
def test_a_size_is_read_as_it_is_written(words: int) -> None:
    size = 4 * words
    assert read_size(str(size)) == size
    for text in (f"{words}K", f"{words} KB", f"{words}kb"):
        assert read_size(text) == words * 1024
    if size % 1024 == 0 and size < 1 << 20:
        assert read_size(size_text(size)) == size


@pytest.mark.parametrize("text", ["", "0", "3", "4T", "-4K", "1.5M", "K"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        read_size(text)


def test_speeds_and_times() -> None:
    assert read_speed("1gbit") == 125e6
    assert read_speed("2.5Gbit") == 312.5e6
    with pytest.raises(ValueError, match="not a speed"):
        read_speed("fast")
    assert [time_text(value) for value in (2.5e-7, 3.82e-5, 1.04e-3, 2.0, math.nan)] == [
        "0.25 µs",
        "38.2 µs",
        "1.04 ms",
        "2 s",
        "",
    ]


def test_bandwidths_are_those_of_nccl_tests() -> None:
    """https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md: busbw = algbw * 2 (n-1) / n."""
    result = Measured("macft", 8_000_000, 4)
    result.add_turn([0.002, 0.004, 0.030])
    result.add_turn([0.004])
    assert result.algorithm_bandwidth == pytest.approx(2e9)
    assert result.bus_bandwidth == pytest.approx(3e9)
    other = Measured("peer", 8_000_000, 4)
    other.add_turn([0.008])
    other.add_turn([0.012])
    assert other.ratio_to(result) == pytest.approx((2 + 3) / 2)


@pytest.mark.slow
def test_local_ranks_with_peers(tmp_path: Path) -> None:
    path = tmp_path / NASTY / "results.json"
    path.parent.mkdir()
    arguments = [
        "topology.nodes=3",
        "--sizes",
        "4K,1M",
        "--turns",
        "2",
        "--peers",
        "mlx",
        "--limits",
        "--link",
        "10gbit",
    ]
    process = bench(*arguments, "--json", str(path))
    printed, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "busbw GB/s" in printed
    assert "% of link" in printed
    assert "memory copy" in printed
    found = json.loads(path.read_text())
    assert (found["ranks"], found["link"]) == (3, 1.25e9)
    assert [(r["name"], r["size"]) for r in found["results"]] == [
        (name, size) for size in (4, 4096, 1 << 20) for name in ("macft", "mlx", "tcp")
    ]
    for result in found["results"]:
        assert result["failure"] == ""
        assert 0 < result["median"] <= result["p95"]
        assert result["bus_bandwidth"] == pytest.approx(result["size"] / result["median"] * 4 / 3)


RESERVE = """
import sys
from macft.collective_bench import ports
ports._FIRST, ports._LAST = 31_900, 31_940
print(*ports.free_addresses(3), flush=True)
sys.stdin.read()
"""


def test_ports_of_another_process_are_not_given_out_before_it_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_FIRST", 31_900)
    monkeypatch.setattr(ports, "_LAST", 31_940)

    def some() -> set[str]:
        return {address for _ in range(300) for address in ports.free_addresses(2, in_a_row=1)}

    command = [sys.executable, "-c", RESERVE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        theirs = set(read_line(other.stdout).split())
        assert len(theirs) == 3
        assert not theirs & some()
        other.communicate("")
    assert theirs & some()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ring", "mlx"])
def test_the_ranks_of_hosts_measure_together(tmp_path: Path, backend: str) -> None:
    # Each rank uses its port and the three after it.
    hosts = ",".join(free_addresses(2, in_a_row=4))
    ranks = []
    for rank in range(2):
        arguments = ["topology=hosts", f"topology.hosts=[{hosts}]", f"topology.rank={rank}", f"collective={backend}"]
        arguments += ["--sizes", "64K", "--turns", "2", "--peers", "tcp", "--json", str(tmp_path / f"{rank}.json")]
        ranks.append(bench(*arguments))
    printed = [rank.communicate(timeout=200) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], printed
    assert "busbw" in printed[0][0]
    assert "busbw" not in printed[1][0]
    found = json.loads((tmp_path / "0.json").read_text())
    assert [(r["name"], r["size"], len(r["turns"])) for r in found["results"]] == [
        (name, size, 2) for size in (4, 65_536) for name in ("macft", "tcp")
    ]
    assert not (tmp_path / "1.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "3"], "--sizes: '3' is not a size"),
        (["--peers", "nccl"], "--peers: 'nccl' is not one of mlx, gloo, mpi, tcp"),
        (["--link", "fast"], "--link: 'fast' is not a speed"),
        (["topology=single"], "topology: one node has nothing to exchange"),
        (["topology.node=3"], "topology.node: no such key; did you mean topology.nodes?"),
        (["--training", "--cases", "9B"], "--cases: '9B' is not one of 135M-sql, "),
        (["--training", "topology=local"], "topology=local: --training takes no overrides"),
        (["--training", "--steps", "0"], "--steps: must be greater than 0"),
        (["--quick"], "--quick: needs --training"),
        (["--json", "/no/such/folder/x.json"], "--json: the folder /no/such/folder does not exist"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, arguments) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {message}")


@pytest.mark.slow
def test_a_peer_that_hangs_is_left_out_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    with (
        MeasuredGroup("tcp", free_addresses(2), limit=60.0) as well,
        MeasuredGroup("tcp", free_addresses(2), limit=15.0) as hanging,
    ):
        hanging.name = "hanging"
        os.kill(hanging.process_ids[1], signal.SIGSTOP)
        rows = measure([well, hanging], [4096, 65_536], 2, lambda _: None)
    assert [row[1].failure for row in rows] == ["hanging: hung for 15 s"] * 2
    assert [(len(row[0].turns), len(row[1].turns)) for row in rows] == [(2, 0)] * 2


def test_a_lane_that_can_not_start_says_why() -> None:
    with pytest.raises(GroupFailed, match=r"^tcp: (rank \d: \w*(Error|error): |a rank ended)"):
        MeasuredGroup("tcp", ["256.0.0.1:9", "256.0.0.1:10"], limit=60.0)


def test_the_limits_are_measured_or_unknown() -> None:
    assert memory_copy() > 1e6
    assert link_speed("127.0.0.1") is None
    assert link_speed("no-such-host.invalid") is None


@pytest.mark.slow
def test_thousands_of_adapter_shaped_calls_do_not_hang() -> None:
    """The short form of benchmarks/deadlock.py; every sum is checked there."""
    command = [sys.executable, str(BENCHMARKS / "deadlock.py"), "--names", "macft", "--ranks", "3", "--calls", "1260"]
    done = subprocess.run(
        [*command, "--modes", "tensors", "--limit", "60"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    name, mode, calls, hangs, failures, *_ = done.stdout.splitlines()[-1].split()
    assert (name, mode, calls, hangs, failures) == ("macft", "tensors", "1260", "0", "0")


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from macft.collective_bench.table import PlotFailed, plot

    row = [Measured("macft", 4096, 2, [1e-3], [1e-3]), Measured("mlx", 4096, 2, failure="mlx: hung")]
    plot([row], tmp_path / "plot.svg", "title", 1e9)
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    with pytest.raises(PlotFailed, match="can't be written"):
        plot([row], tmp_path / "plot.nonsense", "title", None)


def same_losses(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs benchmarks/same_losses.py."""
    command = [sys.executable, str(BENCHMARKS / "same_losses.py"), *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=250, check=False)


@pytest.mark.slow
def test_a_loss_that_differs_by_one_bit_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    done = same_losses("--only", "one-node", "--save", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(path.read_text())
    loss = content["configurations"]["one-node"]["figures"]["steps"][-1]["loss"]
    for changed, status, result in ((loss, 0, "identical"), (math.nextafter(loss, 0), 1, "loss ")):
        content["configurations"]["one-node"]["figures"]["steps"][-1]["loss"] = changed
        path.write_text(json.dumps(content))
        done = same_losses("--only", "one-node", "--against", str(path))
        row, last = done.stdout.splitlines()[-2:]
        assert (done.returncode, result in row) == (status, True), done.stdout + done.stderr
        assert last == f"{1 - status} of 1 configurations are bit-identical"
