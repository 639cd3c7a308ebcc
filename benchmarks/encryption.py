"""What encryption costs: all-reduces of float32 on two ranks, plain and encrypted, by turns in the same processes.

python benchmarks/encryption.py
sudo python benchmarks/encryption.py --links 1gbit         (Linux: network namespaces, shaped by tc tbf)
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import ExitStack

import numpy as np

from macft.collective.ring.listener import Listener
from macft.collective.ring.ring import Ring
from macft.collective.settings import CollectiveConfig
from macft.collective_bench.ports import free_addresses
from ranks import hear, start, tell
from shaped_links import ShapedLinks

SIZES = (4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", default="", help="speeds of shaped links, such as 1gbit; none: loopback")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="bytes, multiples of 4 (4 KB to 64 MB)")
    parser.add_argument("--turns", type=int, default=9, help="turns of each at each size (%(default)s)")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)  # a rank's own process
    options = parser.parse_args()
    if options.rank is not None:
        return work(options.rank, [int(size) for size in options.sizes.split(",")], options.turns)
    for link in options.links.split(",") if options.links else [""]:
        with ExitStack() as stack:
            shaped = stack.enter_context(ShapedLinks(2, link)) if link else None
            compare(options, link or "loopback", shaped)
    return None


def compare(options: argparse.Namespace, title: str, shaped: ShapedLinks | None) -> None:
    """Starts two ranks, introduces them to each other, prints what the first one measures."""
    own = [__file__, "--sizes", options.sizes, "--turns", str(options.turns), "--rank"]
    ranks = start(own, shaped.prefixes if shaped else [[], []])
    lanes = [shaped.addresses(lane) if shaped else free_addresses(2) for lane in ("plain", "encrypted")]
    for rank, process in enumerate(ranks):
        tell(process, [lane[rank] for lane in lanes])
    keys = [hear(process) for process in ranks]
    for process in ranks:
        tell(process, [lanes, keys])
    print(f"\n{title}: 2 ranks\n{'bytes':>10} {'plain ms':>10} {'encrypted':>10} {'ratio':>12}", flush=True)
    for size in map(int, options.sizes.split(",")):
        plain, encrypted, ratio = hear(ranks[0])
        print(f"{size:>10} {plain * 1e3:10.3f} {encrypted * 1e3:10.3f} {ratio:12.2f}", flush=True)
    for process in ranks:
        process.communicate()


def work(rank: int, sizes: list[int], turns: int) -> None:
    """One rank: a plain and an encrypted ring, used by turns; rank 0 prints a line for each size."""
    own = json.loads(input())
    listeners = [Listener(own[0], CollectiveConfig()), Listener(own[1], CollectiveConfig(), encrypted=True)]
    security = listeners[1].security
    assert security is not None
    print(json.dumps(security.public_key.hex()), flush=True)
    lanes, keys = json.loads(input())
    security.meet([bytes.fromhex(key) for key in keys], rank)
    with ExitStack() as stack:
        rings = [stack.enter_context(Ring(rank, 2, lane, at)) for lane, at in zip(lanes, listeners, strict=True)]
        for size in sizes:
            seconds: list[list[float]] = [[], []]
            repeats = max(1, min(50, (4 << 20) // size))
            for turn in range(turns + 1):  # the first one warms up
                for which in (0, 1) if turn % 2 else (1, 0):
                    array = np.ones(size // 4, np.float32)
                    rings[which].barrier()
                    begin = time.perf_counter()
                    for _ in range(repeats):
                        rings[which].all_reduce([array])
                    seconds[which] += [(time.perf_counter() - begin) / repeats] if turn else []
            ratio = statistics.median(encrypted / plain for plain, encrypted in zip(*seconds, strict=True))
            if rank == 0:
                print(json.dumps([*map(statistics.median, seconds), ratio]), flush=True)
        for ring in rings:
            ring.barrier()


if __name__ == "__main__":
    main()
