"""What gradient codecs cost and save: the exchange of a LoRA gradient between two ranks over links of several speeds.

    sudo python benchmarks/codecs.py --links 100mbit,1gbit        (Linux: network namespaces, shaped by tc tbf)

The gradient is that of SmolLM2-135M with LoRA of rank 8 on 16 blocks, in its own buckets. All codecs take turns in
the same processes; times are those of the slower rank, encoding and decoding included, each rank on a core of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from itertools import islice

import numpy as np

from deadlock import LAYERS, RANK
from macft.collective.codecs.choose import make
from macft.collective.ring.ring import Ring
from macft.collective.settings import CODECS, CollectiveConfig
from macft.collective_bench.ports import free_addresses
from ranks import hear, start, tell
from shaped_links import ShapedLinks

BLOCKS = 16
NAMES = [name for name in CODECS if name != "auto"]


def gradient() -> list[dict[str, np.ndarray]]:
    """float32 arrays by name, in buckets."""
    shapes = [shape for _ in range(BLOCKS) for layer in LAYERS for shape in ((layer[0], RANK), (RANK, layer[1]))]
    arrays = {f"{place}": np.random.default_rng(place).normal(size=shape) for place, shape in enumerate(shapes)}
    items = iter((name, array.astype(np.float32)) for name, array in arrays.items())
    most = CollectiveConfig().bucket_bytes // 4
    count = max(1, most * len(shapes) // sum(array.size for array in arrays.values()))
    return [dict(bucket) for bucket in iter(lambda: list(islice(items, count)), [])]


def work(rank: int, turns: int) -> None:
    """One rank; it prints the seconds of each turn and the bytes of one, by codec."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank % os.cpu_count()]})
    buckets = gradient()
    with Ring(rank, 2, json.loads(input())) as ring:
        seconds: dict[str, list[float]] = {name: [] for name in NAMES}
        sent: dict[str, int] = {}
        codecs = {name: make(name, 1) for name in NAMES}
        for turn in range(turns + 1):  # the first one warms up
            for name in NAMES if turn % 2 else reversed(NAMES):
                copies = [{key: array.copy() for key, array in bucket.items()} for bucket in buckets]
                ring.barrier()
                before, begin = ring.bytes_sent, time.perf_counter()
                for bucket in copies:
                    codecs[name].all_reduce(ring, list(bucket), list(bucket.values()))
                seconds[name] += [time.perf_counter() - begin] if turn else []
                sent[name] = ring.bytes_sent - before
        ring.barrier()
    print(json.dumps([seconds, sent]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", default="100mbit,1gbit", help="speeds, or loopback (%(default)s)")
    parser.add_argument("--turns", type=int, default=9, help="turns of each codec (%(default)s)")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)  # a rank's own process
    options = parser.parse_args()
    if options.rank is not None:
        return work(options.rank, options.turns)
    for link in options.links.split(","):
        if link == "loopback":
            compare(link, [[], []], free_addresses(2), options.turns)
        else:
            with ShapedLinks(2, link) as shaped:
                compare(link, shaped.prefixes, shaped.addresses("codecs"), options.turns)
    return None


def compare(title: str, prefixes: list[list[str]], addresses: list[str], turns: int) -> None:
    """Runs two ranks and prints a row for each codec."""
    ranks = start([__file__, "--turns", str(turns), "--rank"], prefixes)
    for process in ranks:
        tell(process, addresses)
    found = [hear(process) for process in ranks]
    print(f"\n{title}\n{'codec':>10} {'MB sent':>8} {'ms':>9} {'of exact':>9}", flush=True)
    both = {name: [max(pair) for pair in zip(*(seconds[name] for seconds, _ in found), strict=True)] for name in NAMES}
    for name in NAMES:
        ratio = statistics.median(a / b for a, b in zip(both[name], both["none"], strict=True))
        ms = 1e3 * statistics.median(both[name])
        print(f"{name:>10} {found[0][1][name] / 1e6:8.3f} {ms:9.2f} {ratio:9.2f}", flush=True)
    for process in ranks:
        process.communicate()


if __name__ == "__main__":
    main()
