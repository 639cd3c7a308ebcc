"""Does it ever hang? Many all-reduces of a real adapter's tensors: macft's ring, and MLX's ring under the same load.

    python benchmarks/deadlock.py --calls 100000 --ranks 2

The shapes are those of SmolLM2-135M with LoRA of rank 8 on all linear layers: 420 tensors of 6 to 48 KB. `tensors` sums
each in a call of its own, as in mlx issue 4475; `adapter` sums all of them in one call. What takes longer than --limit
hangs; its ranks are ended, started again, and go on, until all calls are made or --minutes are over. Every sum is
checked.
"""

from __future__ import annotations

import argparse
import sys
import time

from macft.collective_bench.measured_group import GroupFailed, MeasuredGroup
from macft.collective_bench.ports import free_addresses

RANK, BLOCKS, WIDTH, KEYS, HIDDEN = 8, 30, 576, 192, 1536
LAYERS = [
    (WIDTH, WIDTH),
    (WIDTH, KEYS),
    (WIDTH, KEYS),
    (WIDTH, WIDTH),
    (WIDTH, HIDDEN),
    (WIDTH, HIDDEN),
    (HIDDEN, WIDTH),
]
"""Inputs and outputs of a block's linear layers: q, k, v, o, gate, up, down."""
ELEMENTS = [RANK * side for _ in range(BLOCKS) for layer in LAYERS for side in layer]
CALLS_AN_ORDER = {"tensors": 420, "adapter": 10}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100_000, help="all-reduces of each (%(default)s)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--names", default="macft,mlx")
    parser.add_argument("--modes", default="tensors,adapter")
    parser.add_argument("--limit", type=float, default=30.0, help="seconds after which an order of calls hangs")
    parser.add_argument("--minutes", type=float, default=60.0, help="time limit of each line")
    options = parser.parse_args()
    print(
        f"{'':>6} {'calls of':>9} {'calls':>8} {'hangs':>6} {'other failures':>15} {'seconds':>8} {'calls/s':>8}",
        flush=True,
    )
    worst = 0
    for mode in options.modes.split(","):
        for name in options.names.split(","):
            made, hangs, failures, seconds = run(name, mode, options)
            rate = made / max(seconds, 1e-9)
            print(f"{name:>6} {mode:>9} {made:8d} {hangs:6d} {failures:15d} {seconds:8.1f} {rate:8.0f}", flush=True)
            if name == "macft":
                worst = max(worst, hangs + failures, int(made < options.calls))
    return min(worst, 1)


def run(name: str, mode: str, options: argparse.Namespace) -> tuple[int, int, int, float]:
    """Calls made, hangs, other failures (each told on standard error), and the seconds it took."""
    made = hangs = failures = 0
    started = time.monotonic()
    while made < options.calls and time.monotonic() - started < 60 * options.minutes:
        try:
            with MeasuredGroup(name, free_addresses(options.ranks), limit=options.limit) as group:
                while made < options.calls and time.monotonic() - started < 60 * options.minutes:
                    calls = min(CALLS_AN_ORDER[mode], options.calls - made)
                    answers = group.order(elements=ELEMENTS, calls=calls, fused=mode == "adapter")
                    if any(not answer["right"] for answer in answers):
                        raise GroupFailed(f"{name}: wrong sums")
                    made += calls
        except GroupFailed as error:
            print(error, file=sys.stderr)
            hangs, failures = (hangs + 1, failures) if "hung" in str(error) else (hangs, failures + 1)
            made += 1  # the call that did not come back, so that a peer that always hangs comes to an end
    return made, hangs, failures, time.monotonic() - started


if __name__ == "__main__":
    sys.exit(main())
