"""``python -m macft.bench``: measures the all-reduce of a topology's ranks, in a table like that of nccl-tests.

With ``--training`` it measures training on this machine instead, beside mlx_lm's trainer, with random weights. It shows
a table and writes a small file without personal data. ``macft plan`` uses the figures from then on.

    python -m macft.bench                                           two processes on this machine
    python -m macft.bench topology=local topology.nodes=4 --peers mlx --limits
    python -m macft.bench topology=hosts 'topology.hosts=[192.168.0.1,192.168.0.2]' --link 40gbit    run on each Mac
    python -m macft.bench collective=mlx                            MLX's own communication instead of macft's ring
    python -m macft.bench --training                                training, in all cases that fit this machine
    python -m macft.bench --training --quick --cases 135M-sql       one small case, about a minute

Overrides are those of macft.train; topology and collective are used here. Sizes are bytes of float32, times those of
the slowest rank. algbw is size over time. busbw is 2(n-1)/n of it: what each link carries, for any number of ranks.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from macft.cli.parser import Parser, check_output, program_name
from macft.cli.run_command import run_command
from macft.collective_bench.here import measure_here
from macft.collective_bench.limits import link_speed, memory_copy
from macft.collective_bench.measured_group import GroupFailed, MeasuredGroup
from macft.collective_bench.ports import free_addresses
from macft.collective_bench.sides import Joined, Side
from macft.collective_bench.sizes import read_size, read_speed, size_text, speed_text, time_text
from macft.collective_bench.table import LATENCY_BYTES, build, plot, summary, to_plain
from macft.collective_bench.tcp import RawTcp
from macft.collective_bench.turns import Measured, measure
from macft.config.command_line import prepare
from macft.config.schema import TrainConfig
from macft.config.yaml import must_match
from macft.errors import CollectiveError, ConfigError
from macft.rendezvous.hosts import connect_hosts
from macft.rendezvous.keystore import keyring_for
from macft.topology.hosts import own_rank
from macft.topology.settings import split_host

SIZES = "4K,16K,64K,256K,1M,4M,16M,64M"
PEERS = ("mlx", "gloo", "mpi", "tcp")
_TRAINING_FILE = "macft-training.json"
_TCP_PORT_OFFSET = 3
"""Offset of the TCP copy's port from the topology's; the ports before are for the rendezvous, the ring and MLX."""


def main(argv: Sequence[str]) -> int | None:
    """Measures, and prints the tables on rank 0. Returns the exit status; None is success.

    Raises:
        MacftError: The arguments are wrong, or a rank failed.
    """
    options = _options(argv)
    if options.training:
        return _train(options)
    config = _compose(options.overrides)
    results, rank = (
        _measure_hosts(options, config) if config.topology.kind == "hosts" else _measure_local(options, config)
    )
    if rank == 0:
        _report(options, config, results)
    return None


def _train(options: argparse.Namespace) -> int:
    from macft.training_bench.cases import find_cases  # mlx-lm is slow to import, and the other benchmark needs none
    from macft.training_bench.command import Wanted, bench_training

    try:
        cases = find_cases(options.cases)
    except ValueError as error:
        raise ConfigError(f"--cases: {error}") from None
    return bench_training(Wanted(cases, bool(options.cases), options.quick, options.steps, options.out))


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(program_name("bench"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="as of macft.train: topology=local topology.nodes=4")
    parser.add_argument("--sizes", default=SIZES, help="bytes of the arrays (%(default)s)")
    parser.add_argument("--turns", type=int, default=9, help="turns at each size (%(default)s)")
    parser.add_argument("--peers", default="", help=f"to compare with, by turns: {', '.join(PEERS)}")
    parser.add_argument(
        "--peer-python", default=sys.executable, help="interpreter that has torch or mpi4py, NumPy, platformdirs"
    )
    parser.add_argument("--limits", action="store_true", help="also measure the bare TCP copy and copying memory")
    parser.add_argument("--link", default="", help="the links' speed (1gbit); otherwise as the system states it")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds after which a peer hangs (%(default)s)")
    parser.add_argument("--json", type=Path, help="file for all results")
    parser.add_argument("--plot", type=Path, help="file for a plot: .png, .svg or .pdf (needs matplotlib)")
    training = parser.add_argument_group("training")
    training.add_argument("--training", action="store_true", help="measure training on this machine, beside mlx_lm")
    training.add_argument("--cases", default="", help="names of cases, with commas; by default all that fit")
    training.add_argument(
        "--steps", type=int, help="steps that are timed in each run (20 of short rows, 5 of long ones)"
    )
    training.add_argument("--quick", action="store_true", help="one run of each side, of a few steps")
    training.add_argument("--out", type=Path, help="file for all results (macft-training.json)")
    options = parser.parse_intermixed_args(arguments)
    _check_training(options)
    try:
        options.sizes = sorted({LATENCY_BYTES, *(read_size(size) for size in options.sizes.split(","))})
    except ValueError as error:
        raise ConfigError(f"--sizes: {error}") from None
    try:
        options.speed = read_speed(options.link) if options.link else None
    except ValueError as error:
        raise ConfigError(f"--link: {error}") from None
    options.peers = [name for name in options.peers.split(",") if name]
    if unknown := [name for name in options.peers if name not in PEERS]:
        raise ConfigError(f"--peers: '{unknown[0]}' is not one of {', '.join(PEERS)}")
    if options.limits and "tcp" not in options.peers:
        options.peers.append("tcp")
    if options.turns < 1 or not options.limit > 0:
        raise ConfigError("--turns and --limit: must be greater than 0")
    for key in ("json", "plot", "out"):
        check_output(f"--{key}", getattr(options, key))
    return options


def _check_training(options: argparse.Namespace) -> None:
    """Options of one benchmark have no effect in the other."""
    options.cases = [name for name in options.cases.split(",") if name]
    if options.training:
        if options.overrides:
            raise ConfigError(
                f"{options.overrides[0]}: --training takes no overrides; see --cases, --steps and --quick"
            )
        if options.steps is not None and options.steps < 1:
            raise ConfigError("--steps: must be greater than 0")
        options.out = options.out or Path(_TRAINING_FILE)
        return
    given = {"--cases": options.cases, "--steps": options.steps, "--quick": options.quick, "--out": options.out}
    if wrong := [name for name, value in given.items() if value]:
        raise ConfigError(f"{wrong[0]}: needs --training")


def _compose(overrides: Sequence[str]) -> TrainConfig:
    """The configuration that macft.train would have; by default two local ranks."""
    given = list(overrides)
    if not any(text.startswith("topology=") for text in given):
        given.insert(0, "topology=local")
    if not any(text.startswith("training.batch_size=") for text in given):
        given.append("training.batch_size=4096")  # nothing is trained; large enough for any number of nodes
    config = prepare(given).job
    assert config is not None
    if config.topology.kind == "single" or (config.topology.kind == "local" and config.topology.nodes < 2):
        raise ConfigError("topology: one node has nothing to exchange; use topology=local topology.nodes=2, or hosts")
    return config


def _measure_local(options: argparse.Namespace, config: TrainConfig) -> tuple[list[list[Measured]], int]:
    nodes, console = config.topology.nodes, Console()
    console.print(f"{nodes} ranks on this machine, collective={config.collective.backend}")
    with ExitStack() as stack:
        groups = []
        for name in ("macft", *options.peers):
            python = options.peer_python if name in ("gloo", "mpi") else sys.executable
            settings = asdict(config.collective)
            try:
                group = MeasuredGroup(
                    name, free_addresses(nodes), settings=settings, python=python, limit=options.limit
                )
            except GroupFailed as error:
                if name == "macft":
                    raise
                console.print(str(error), style="yellow", markup=False)
                continue
            groups.append(stack.enter_context(group))
        with console.status("measuring") as status:
            results = measure(groups, options.sizes, options.turns, lambda row: status.update(_progress(row)))
    if results[-1][0].failure:
        raise GroupFailed(results[-1][0].failure)
    return results, 0


def _measure_hosts(options: argparse.Namespace, config: TrainConfig) -> tuple[list[list[Measured]], int]:
    if others := [name for name in options.peers if name != "tcp"]:
        raise ConfigError(
            f"--peers: {others[0]} needs topology=local; with topology=hosts there is tcp, and collective=mlx"
        )
    topology = config.topology
    rank, count = own_rank(topology), len(topology.hosts)
    endpoints = [split_host(host, topology.port) for host in topology.hosts]
    run_id = f"bench:{','.join(topology.hosts)}"
    keyring = keyring_for(topology, config.collective)
    # All hosts must also measure the same.
    same = must_match(config) | {name: str(getattr(options, name)) for name in ("sizes", "turns", "peers")}
    with ExitStack() as stack:
        collective = stack.enter_context(
            connect_hosts(topology, config.collective, run_id=run_id, must_match=same, keyring=keyring)
        )
        Console().print(f"rank {rank} of {count} ({topology.hosts[rank]}), collective={config.collective.backend}")
        sides: dict[str, Side] = {"macft": Joined(collective)}
        if "tcp" in options.peers:
            addresses = [f"{name}:{number + _TCP_PORT_OFFSET}" for name, number in endpoints]
            try:
                sides["tcp"] = RawTcp(rank, addresses)
            except OSError as error:
                raise CollectiveError(f"--peers=tcp: rank {rank} of {', '.join(addresses)}: {error}") from None
            stack.callback(sides["tcp"].close)
        with Console().status("measuring") as status:
            results = measure_here(
                sides, collective, options.sizes, options.turns, lambda row: status.update(_progress(row))
            )
        options.speed = options.speed or _slowest_link(
            collective.all_gather(json.dumps(link_speed(endpoints[rank][0])).encode())
        )
    return results, rank


def _progress(row: Sequence[Measured]) -> str:
    return f"{size_text(row[0].size)}: {time_text(row[0].median)}"


def _slowest_link(stated: Sequence[bytes]) -> float | None:
    speeds = [json.loads(blob) for blob in stated]
    known = [float(speed) for speed in speeds if isinstance(speed, float) and math.isfinite(speed)]
    return min(known) if len(known) == len(speeds) else None


def _report(options: argparse.Namespace, config: TrainConfig, results: list[list[Measured]]) -> None:
    console = Console()
    for table in build(results, options.speed):
        console.print(table)
    lines = summary(results, options.speed)
    memory = memory_copy() if options.limits else None
    if memory:
        lines.append(f"memory copy, one thread: {speed_text(memory)} GB/s")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    ranks = results[0][0].ranks
    if options.json:
        report = {
            "ranks": ranks,
            "topology": config.topology.kind,
            "link": options.speed,
            "memory_copy": memory,
            "results": to_plain(results),
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.plot:
        plot(results, options.plot, f"All-reduce, {ranks} ranks, topology={config.topology.kind}", options.speed)


if __name__ == "__main__":
    sys.exit(run_command(main))
