"""All-reduce of float32: macft's ring against MLX's ring, torch's gloo and MPI, by turns in one run.

    python benchmarks/allreduce.py --peers mlx,gloo,mpi --ranks 2,4
    sudo python benchmarks/allreduce.py --peers gloo --ranks 2,4 --links 100mbit,1gbit,10gbit      (Linux)

gloo and MPI need a Python with torch, mpi4py, NumPy and platformdirs, given with --peer-python. Each implementation
runs in processes of its own, so that one that hangs (MLX's ring can, mlx issue 4475) is reported and harms no other.
With --links each rank lives in a network namespace whose network card `tc tbf` slows down; the last columns are then
the share of the link that is used: 100 % is the ring algorithm's theoretical time, 2(n-1)/n of the bytes at its speed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from macft.collective_bench.measured_group import GroupFailed, MeasuredGroup
from macft.collective_bench.ports import free_addresses
from macft.collective_bench.sizes import read_size, read_speed, size_text
from macft.collective_bench.turns import Measured, measure
from shaped_links import ShapedLinks

SIZES = "4K,16K,64K,256K,1M,4M,16M,64M"
LOOPBACK = "lo" if sys.platform == "linux" else "lo0"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2,4", help="numbers of ranks (%(default)s)")
    parser.add_argument("--peers", default="mlx", help="of mlx, gloo, mpi, and tcp, the bare copy (%(default)s)")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter for gloo and MPI")
    parser.add_argument("--links", default="", help="speeds of shaped links, such as 100mbit,1gbit; none: loopback")
    parser.add_argument("--sizes", default=SIZES, help="bytes (%(default)s)")
    parser.add_argument("--turns", type=int, default=9, help="turns of each implementation at each size (%(default)s)")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds after which an implementation hangs")
    parser.add_argument("--settings", default="{}", help="macft's collective group as JSON")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    results = []
    for ranks in map(int, options.ranks.split(",")):
        for link in options.links.split(",") if options.links else [""]:
            results.append(compare(options, ranks, link))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def compare(options: argparse.Namespace, ranks: int, link: str) -> dict[str, Any]:
    """One number of ranks over one kind of link: prints its table; returns its results."""
    names = ["macft", *filter(None, options.peers.split(","))]
    print(f"\n{ranks} ranks, {f'links of {link}' if link else 'loopback'}", flush=True)
    with ExitStack() as stack:
        shaped = stack.enter_context(ShapedLinks(ranks, link)) if link else None
        groups = []
        for name in names:
            try:
                groups.append(stack.enter_context(start(name, options, ranks, shaped)))
            except GroupFailed as error:
                print(error)
        speed = read_speed(link) if link else math.nan
        print(heading([group.name for group in groups], shaped=bool(link)))
        sizes = [read_size(size) for size in options.sizes.split(",")]
        found = measure(groups, sizes, options.turns, lambda row: print(line(row, speed), flush=True))
    means = summary(found)
    print("\n".join(means))
    rows = [{**vars(result), "median": result.median, "p95": result.p95} for row in found for result in row]
    return {"ranks": ranks, "link": link, "results": rows, "summary": means}


def start(name: str, options: argparse.Namespace, ranks: int, shaped: ShapedLinks | None) -> MeasuredGroup:
    """The group of implementation ``name``."""
    return MeasuredGroup(
        name,
        shaped.addresses(name) if shaped else free_addresses(ranks),
        settings=json.loads(options.settings),
        python=options.peer_python if name in ("gloo", "mpi") else sys.executable,
        prefixes=shaped.prefixes if shaped else (),
        interface=shaped.interface if shaped else LOOPBACK,
        environment=shaped.environment if shaped else {},
        limit=options.limit,
    )


def heading(names: Sequence[str], *, shaped: bool) -> str:
    columns = [f"{name + ' ms':>12}" for name in names] + [f"{name + '/macft':>12}" for name in names[1:]]
    return " ".join([f"{'size':>8}", *columns, *(f"{'% of ' + name:>12}" for name in names if shaped)])


def line(row: Sequence[Measured], speed: float) -> str:
    """Medians in ms, ratios to macft; with a ``speed`` (bytes/s), theoretical over measured ring time in percent."""
    words = [f"{size_text(row[0].size):>8}"]
    words += [f"{result.median * 1e3:12.3f}" for result in row]
    words += [f"{result.ratio_to(row[0]):12.2f}" for result in row[1:]]
    # Less than that may fit the bucket that `tbf` lets through at once.
    if math.isfinite(speed) and row[0].size >= 1 << 20:
        words += [f"{100 * result.bus_bandwidth / speed:12.1f}" for result in row]
    failed = [result.failure for result in row if result.failure]
    return " ".join(words) + "".join(f"\n  {failure}" for failure in failed)


def summary(found: Sequence[Sequence[Measured]]) -> list[str]:
    """For each peer the geometric mean of its ratios to macft, and the size at which macft stands worst."""
    lines = []
    for place in range(1, len(found[0])):
        ratios = {
            row[0].size: row[place].ratio_to(row[0]) for row in found if not math.isnan(row[place].ratio_to(row[0]))
        }
        if not ratios:
            continue
        mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
        worst = min(ratios, key=lambda size: ratios[size])
        name = found[0][place].name
        lines.append(
            f"{name}: {mean:.2f} times macft's time (geometric mean); at worst {ratios[worst]:.2f}, {size_text(worst)}"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
