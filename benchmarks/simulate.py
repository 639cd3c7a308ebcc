"""Which cable and codec keep 90% efficiency, for which model and number of Macs: a simulator to 64 nodes.

    python benchmarks/simulate.py                         check against the measured points, table and docs/scaling.png
    python benchmarks/simulate.py --measure               measure the ring on shaped links first (Linux, root)

A step takes as long as its slowest node computes, and then the ring: 2(n-1) messages in a row, each with the latency of
a link, and 2(n-1)/n of the (encoded) gradient through every link. Nothing overlaps. Latency and bandwidth are fitted
to the ring of 2 ranks; the rings of 4 and 8 ranks and the training steps of scaling.py check the model. A node's time
is measured (SmolLM2 here) or comes from `python -m macft.plan`'s estimate for a Mac. Each node's step varies by a
lognormal factor (stragglers), drawn with a fixed seed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from macft.device.chips import find_mac
from macft.device.kind import METAL
from macft.model.adapters.settings import AdapterConfig
from macft.model.execution import resolve
from macft.model.settings import ModelConfig
from macft.model.shape import ModelShape, shape_of
from macft.planner.known_models import known_models
from macft.planner.memory import trained_part
from macft.planner.memory_planner import MemoryPlanner
from macft.planner.speed import MAC_EFFICIENCY, step_cost
from macft.planner.workload import unlike_rows

HERE = Path(__file__).parent
POINTS = HERE / "scaling_measured.json"
NODES = (2, 3, 4, 8, 16, 32, 64)
# 64 KiB would slip through the token bucket (256 KB) unshaped; 4 KiB shows the latency.
SIZES = (4 << 10, 1 << 20, 5 << 20)
RANKS = (2, 4, 8)
GOAL = 0.9
DRAWS = 400
# Coefficient of variation of a node's step time on a machine that does nothing else.
JITTER = 0.03
POWERSGD_RANK = 2


@dataclass(frozen=True)
class Link:
    """A cable: seconds a message takes, bytes a second in each direction, and where the figures are from."""

    name: str
    latency: float
    bandwidth: float
    source: str


@dataclass(frozen=True)
class Job:
    """A model being trained: one node's compute time a step in seconds, and its gradient's trainable matrices."""

    name: str
    seconds: float
    matrices: tuple[tuple[int, int], ...]

    @property
    def gradient_bytes(self) -> int:
        return 4 * sum(rows * columns for rows, columns in self.matrices)


LINKS = (
    Link("Wi-Fi 6", 3e-3, 60e6, "assumed"),
    Link("1 GbE", 150e-6, 117e6, "measured here on a shaped link"),
    Link("10 GbE", 60e-6, 1.17e9, "assumed: ten times 1 GbE"),
    Link("Thunderbolt 4, IP", 300e-6, 0.66e9, "reported: 5.3 Gb/s in the slower direction"),
    Link("Thunderbolt 5, RDMA", 9e-6, 3.5e9, "reported: 3 to 9 us, 3.5 to 3.8 GB/s"),
)
CODECS = ("none", "bf16", "int8", "powersgd")


def encoded_share(codec: str, job: Job) -> tuple[float, int]:
    """(encoded bytes as a share of float32, all-reduces a step)."""
    if codec == "powersgd":
        # P and Q of each matrix, in float32, one after the other; a matrix that gains nothing goes as it is.
        sent = sum(min(a * b, POWERSGD_RANK * (a + b)) for a, b in job.matrices)
        return 4 * sent / job.gradient_bytes, 2
    # int8 with a float32 scale for each 256 values.
    return {"none": 1.0, "bf16": 0.5, "int8": 0.25 + 1 / 256}[codec], 1


def ring_seconds(ranks: int, size: float, latency: float, bandwidth: float) -> float:
    """An all-reduce of ``size`` bytes over a ring without overlap between its 2(n-1) rounds."""
    return 2 * (ranks - 1) * (latency + size / ranks / bandwidth) if ranks > 1 else 0.0


def step_seconds(job: Job, ranks: int, link: Link, codec: str, *, jitter: float = JITTER, slow: float = 1.0) -> float:
    """Mean time of a step in which every node has the rows of a single one; ``slow``: one node's extra factor."""
    share, rounds = encoded_share(codec, job)
    generator = np.random.default_rng(ranks)
    sigma = np.sqrt(np.log1p(jitter**2))
    factors = generator.lognormal(-(sigma**2) / 2, sigma, (DRAWS, ranks))
    factors[:, 0] *= slow
    exchange = rounds * ring_seconds(ranks, share * job.gradient_bytes / rounds, link.latency, link.bandwidth)
    return job.seconds * float(factors.max(axis=1).mean()) + exchange


def efficiency(job: Job, ranks: int, link: Link, codec: str, *, slow: float = 1.0) -> float:
    """Weak scaling: a lone node's step time over that of ``ranks`` nodes with as many rows each."""
    return job.seconds / step_seconds(job, ranks, link, codec, slow=slow)


def matrices(shape: ModelShape, adapter: AdapterConfig) -> tuple[tuple[int, int], ...]:
    """Sizes of the trained matrices of all blocks."""
    each: list[tuple[int, int]] = []
    for linear in shape.linears:
        if adapter.type == "full":
            each.append((linear.inputs, linear.outputs))
        else:
            each += [(linear.inputs, adapter.rank), (adapter.rank, linear.outputs)]
    return tuple(each * (trained_part(shape, adapter).depth))


def mac_job(model: str, mac: str, adapter: AdapterConfig, rows: int, length: int) -> Job:
    """What `macft.plan` estimates for ``rows`` x ``length`` tokens a step on a Mac."""
    shape = shape_of(known_models()[model], model)
    execution = resolve(ModelConfig(), shape.checkpoint, METAL, packing="false", compile="false")
    steps = [unlike_rows(rows, length, length // 4)]
    planner = MemoryPlanner(shape, execution, adapter, "adamw", steps, validation_rows=0)
    operations = step_cost(planner, execution).operations
    seconds = operations / (find_mac(mac).chip.tflops * 1e12 * MAC_EFFICIENCY)
    name = model.split("/")[-1].removesuffix("-4bit").replace("-Instruct", "").replace("Meta-", "")
    kind = "full" if adapter.type == "full" else f"LoRA {adapter.rank}"
    return Job(f"{name}, {kind}, {mac}", seconds, matrices(shape, adapter))


def jobs() -> list[Job]:
    """The models of the table: 8 rows of 512 tokens a node and step."""
    lora, full = AdapterConfig(), AdapterConfig(type="full")
    return [
        mac_job("mlx-community/Qwen3-0.6B-4bit", "M4 16GB", lora, 8, 512),
        mac_job("mlx-community/Llama-3.2-1B-Instruct-4bit", "M4 16GB", lora, 8, 512),
        mac_job("mlx-community/Llama-3.2-1B-Instruct-4bit", "M4 Max 64GB", lora, 8, 512),
        mac_job("mlx-community/Llama-3.2-1B-Instruct-4bit", "M4 Max 64GB", full, 8, 512),
        mac_job("mlx-community/Meta-Llama-3.1-8B-Instruct-4bit", "M4 Max 64GB", lora, 8, 512),
    ]


def fit(points: dict[str, Any]) -> tuple[float, float]:
    """(latency, bandwidth) of the measured link from its 2-rank all-reduces, least squares on relative errors."""
    rows = [(2.0, point["bytes"], point["seconds"]) for point in points["all_reduce"] if point["ranks"] == 2]
    left = np.array([[count / seconds, size / seconds] for count, size, seconds in rows])
    (latency, pace), *_ = np.linalg.lstsq(left, np.ones(len(rows)), rcond=None)
    return max(float(latency), 0.0), 1 / float(pace)


def check(points: dict[str, Any]) -> None:
    """Prints measured against simulated, the points that were not fitted marked."""
    latency, bandwidth = fit(points)
    print(f"ring on the shaped link: latency {latency * 1e6:.0f} us, {bandwidth / 1e6:.1f} MB/s")
    print(f"| {'all-reduce':22} | measured ms | simulated ms | error |\n| --- | ---: | ---: | ---: |")
    for point in points["all_reduce"]:
        guess = ring_seconds(point["ranks"], point["bytes"], latency, bandwidth)
        mark = " (fitted)" if point["ranks"] == 2 else ""
        name = f"{point['ranks']} ranks, {point['bytes'] >> 10} KiB{mark}"
        print(f"| {name:22} | {point['seconds'] * 1e3:.2f} | {guess * 1e3:.2f} | {guess / point['seconds'] - 1:+.0%} |")
    print(f"\n| {'training, 2 nodes':22} | measured s | simulated s | error |\n| --- | ---: | ---: | ---: |")
    for point in points["training"]:
        on_link = point["link"] != "loopback"
        # From lone nodes on both cores: what the machine's shared memory costs is no matter of the ring.
        alone = point["ceiling"] / (1 if point["name"] == "weak" else 2)
        job = Job("", alone, ((1, point["gradient_bytes"] // 4),))
        link = Link("", latency if on_link else 0.0, bandwidth if on_link else 1e9, "")
        guess = step_seconds(job, 2, link, "none")
        name = f"{point['name']}, {point['rows']} rows, {point['link']}"
        print(f"| {name:22} | {point['two']:.3f} | {guess:.3f} | {guess / point['two'] - 1:+.0%} |")


def largest(job: Job, link: Link, codec: str) -> str:
    """The largest number of nodes of NODES with at least 90% efficiency."""
    good = [ranks for ranks in NODES if efficiency(job, ranks, link, codec) >= GOAL]
    return str(max(good)) if good else "-"


def table(all_jobs: list[Job]) -> None:
    """Prints the largest number of Macs that keeps 90% efficiency for each model, cable and codec."""
    print(f"\n| model, adapter, Mac | s/step | gradient MB | codec | {' | '.join(link.name for link in LINKS)} |")
    print("| --- | ---: | ---: | --- |" + " ---: |" * len(LINKS))
    for job in all_jobs:
        for codec in CODECS:
            cells = " | ".join(largest(job, link, codec) for link in LINKS)
            print(f"| {job.name} | {job.seconds:.2f} | {job.gradient_bytes / 1e6:.1f} | {codec} | {cells} |")
    print("\none Mac 1.5 times slower than the others, 8 Macs, 10 GbE, no codec, equal shares | shares by speed")
    for job in all_jobs:
        equal = efficiency(job, 8, LINKS[2], "none", slow=1.5)
        total = 7 + 1 / 1.5
        print(f"  {job.name}: {equal:.0%} | {efficiency(job, 8, LINKS[2], 'none') * total / 8:.0%}")


def plot(all_jobs: list[Job], path: Path) -> None:
    """Efficiency over nodes: a panel a job, a colour a cable, solid without codec and dashed with int8."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(all_jobs), figsize=(4 * len(all_jobs), 3.6), sharey=True)
    for axis, job in zip(axes, all_jobs, strict=True):
        for number, link in enumerate(LINKS):
            for codec, style in (("none", "-"), ("int8", "--")):
                values = [efficiency(job, ranks, link, codec) for ranks in NODES]
                axis.plot(NODES, values, style, color=f"C{number}", label=link.name if codec == "none" else None)
        axis.axhline(GOAL, color="grey", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xticks(NODES, [str(ranks) for ranks in NODES])
        axis.set_title(f"{job.name}\n{job.seconds:.1f} s a step, {job.gradient_bytes / 1e6:.0f} MB", fontsize=9)
        axis.set_xlabel("Macs")
    axes[0].set_ylabel("efficiency (simulated)")
    axes[0].set_ylim(0, 1.02)
    axes[-1].legend(fontsize=7, title="solid: no codec, dashed: int8", title_fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def measure() -> list[dict[str, Any]]:
    """All-reduces on links of 1 Gbit/s."""
    from shaped_links import ShapedLinks

    found = []
    for ranks in RANKS:
        with ShapedLinks(ranks, "1gbit") as links:
            addresses = links.addresses("macft")
            processes = [
                subprocess.Popen(
                    [*prefix, sys.executable, __file__, "--rank", str(rank), "--addresses", *addresses],
                    stdout=subprocess.PIPE,
                    text=True,
                    env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
                )
                for rank, prefix in enumerate(links.prefixes)
            ]
            try:
                outputs = [process.communicate(timeout=120)[0] for process in processes]
            finally:
                for process in processes:
                    process.kill()
            found += [{"ranks": ranks, **point} for point in json.loads(outputs[0])]
    return found


def ring_rank(rank: int, addresses: list[str]) -> None:
    """One rank of the measurement."""
    from macft.collective.ring.ring import Ring

    found = []
    with Ring(rank, len(addresses), addresses) as ring:
        for size in SIZES:
            array, times = np.zeros(size // 4, np.float32), []
            for turn in range(12):
                ring.barrier()
                started = time.perf_counter()
                ring.all_reduce([array])
                if turn >= 3:
                    times.append(time.perf_counter() - started)
            found.append({"bytes": size, "seconds": statistics.median(times)})
    print(json.dumps(found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help=f"measure the ring and write {POINTS.name}")
    parser.add_argument("--plot", type=Path, default=HERE.parent / "docs" / "scaling.png")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--addresses", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        ring_rank(options.rank, options.addresses)
        return 0
    points = json.loads(POINTS.read_text()) if POINTS.exists() else {"all_reduce": [], "training": []}
    if options.measure:
        points["all_reduce"] = measure()
        POINTS.write_text(json.dumps(points, indent=1) + "\n")
    if points["all_reduce"]:
        check(points)
    all_jobs = jobs()
    table(all_jobs)
    plot(all_jobs, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
