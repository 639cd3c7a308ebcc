"""Malformed frames for every port that macft opens, while the work that the port is for goes on.

    python benchmarks/fuzz_wire.py --frames 1000000 --write
    python benchmarks/fuzz_wire.py --frames 20000 --surface membership --mode plain --seed 7 --first-batch 12

Each port is opened in a process of its own (`harness/fuzz/targets.py`), which does its work all along: rings add up
known numbers, ranks meet at the rendezvous, a machine with the right code is let into the cluster, a link is measured.
Frames are made from valid ones (`harness/fuzz/mutations.py`): bits flipped, cut off, lengths and msgpack fields set to
other values, arrays nested a thousand times, parts in another order, sent again. They arrive over ZeroMQ, with the key
of a machine that takes part where the port is encrypted, and as bytes over TCP; other connections are opened, say a
byte now and then and never go on.

After each batch the work must have gone on, with right results. At the end the process must not have more memory,
threads or descriptors than after the first twentieth of the frames. All frames follow from --seed: a failure names its
batch, and --first-batch repeats it. The exit status is 1 if a port has not stood the attack. --keep FILE makes a long
attack in several calls; --write writes the table to fuzz_wire.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from harness.fuzz.attack import Attack, Broken, Result, difference

SHARES = {
    ("ring", "plain"): 0.252,
    ("ring", "encrypted"): 0.14,
    ("membership", "plain"): 0.17,
    ("membership", "encrypted"): 0.1,
    ("join", "plain"): 0.05,
    ("join", "encrypted"): 0.03,
    ("stream", "plain"): 0.04,
    ("stream", "encrypted"): 0.04,
    ("channel", "plain"): 0.04,
    ("channel", "encrypted"): 0.03,
    ("announcement", "plain"): 0.04,
    ("health", "plain"): 0.024,
    ("serve", "plain"): 0.01,
    ("monitor", "plain"): 0.003,
    ("monitor", "encrypted"): 0.002,
    ("rendezvous", "plain"): 0.012,
    ("rendezvous", "encrypted"): 0.008,
    ("link probe", "plain"): 0.004,
    ("pairing", "plain"): 0.002,
    ("pairing", "encrypted"): 0.001,
    ("guest", "plain"): 0.001,
    ("guest", "encrypted"): 0.001,
}
"""The part of the frames that each port gets: few where a frame takes long, or ends what the port is for."""
_MAX_BYTES_A_FRAME = 20.0
_MAX_BYTES = 8_000_000
"""What memory may grow by is the larger of these two."""
PORTS = {
    "ring": "a rank's port for its left neighbour (ZeroMQ)",
    "stream": "the port of a stream, until its neighbour has connected (TCP)",
    "membership": "heartbeats and votes (ZeroMQ)",
    "join": "requests to join, at the same port",
    "rendezvous": "where the ranks of a run meet (ZeroMQ)",
    "channel": "the stream from one stage of a pipeline to another, by somebody who has its secret (TCP)",
    "serve": "`macft serve` (HTTP)",
    "monitor": "`macft monitor --web` (HTTP; `encrypted`: it wants a token)",
    "pairing": "`cluster init` (TCP, encrypted by the code; `encrypted`: the attacker knows the code)",
    "guest": "`cluster join`, whose `init` is the attacker's (TCP; `encrypted`: who knows the code)",
    "link probe": "measuring a link (TCP)",
    "health": "reports with `collective=mlx` (TCP)",
    "announcement": "`cluster init` by mDNS (UDP)",
}
HEADER = [
    "| port | mode | frames | connections | checks | longest check, s | noted | memory, MB | bytes a frame | threads "
    "| open files |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
]


def row(result: Result) -> str:
    """The table's line."""
    before, after = result.before, result.after
    assert before is not None
    assert after is not None
    return (
        f"| {result.surface} | {result.mode} | {result.frames:,} | {result.connections:,} | {result.checks} | "
        f"{result.longest:.1f} | {result.wrong or 'all right'} | {before.rss / 1e6:.1f} to {after.rss / 1e6:.1f} | "
        f"{(after.rss - before.rss) / max(1, result.frames):.1f} | {before.threads} to {after.threads} | "
        f"{before.descriptors} to {after.descriptors} |"
    )


def grown(result: Result) -> str:
    """What the process has more of than before; empty if nothing."""
    more = difference(result)
    found = []
    if more.rss > max(_MAX_BYTES, _MAX_BYTES_A_FRAME * result.frames):
        found.append(f"{more.rss / 1e6:.0f} MB of memory")
    if more.threads > 0:
        found.append(f"{more.threads} threads")
    if more.descriptors > 0:
        found.append(f"{more.descriptors} open files")
    return ", ".join(found)


def attack(surface: str, mode: str, *, frames: int, seed: int, first_batch: int = 0) -> Result:
    """Attacks one port.

    Raises:
        Broken: it has not stood the attack, or has grown; says which, with the seed and the batch.
    """
    result = Attack(surface, mode, str(seed)).run(frames, first_batch=first_batch)
    if more := grown(result):
        raise Broken(f"{surface}, {mode}, seed {seed}: after {result.frames} frames it has {more} more than before")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=20_000, help="of all ports together, or of one (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--surface", choices=sorted(PORTS), help="one port only")
    parser.add_argument("--mode", choices=("plain", "encrypted"))
    parser.add_argument("--first-batch", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--keep", type=Path, help="a file with the lines so far; ports that are in it are left out")
    options = parser.parse_args()
    chosen = {
        (surface, mode): 1.0 if options.surface else share
        for (surface, mode), share in SHARES.items()
        if options.surface in (None, surface) and options.mode in (None, mode)
    }
    lines, broken, total = [], 0, 0
    kept: dict[str, Any] = json.loads(options.keep.read_text()) if options.keep and options.keep.exists() else {}
    print("\n".join(HEADER), flush=True)
    for (surface, mode), share in chosen.items():
        if (name := f"{surface}, {mode}") in kept:
            lines.append(kept[name]["line"])
            total += kept[name]["frames"]
            continue
        frames = max(100, round(options.frames * share))
        try:
            result = attack(surface, mode, frames=frames, seed=options.seed, first_batch=options.first_batch)
        except Broken as error:
            broken += 1
            line = f"| {surface} | {mode} | broken: {error} |"
        else:
            total += result.frames
            line = row(result)
            if options.keep:
                kept[name] = {"line": line, "frames": result.frames}
                options.keep.write_text(json.dumps(kept))
        lines.append(line)
        print(line, flush=True)
    print(f"{total:,} frames, {broken} of {len(chosen)} ports broken")
    if options.write:
        write(lines, total, options.seed)
    return 1 if broken else 0


def write(lines: list[str], total: int, seed: int) -> None:
    """Replaces the table of fuzz_wire.md."""
    path = Path(__file__).with_suffix(".md")
    text = path.read_text()
    before, after = text.split("<!-- table -->")[0], text.split("<!-- end of table -->")[1]
    table = "\n".join([f"{total:,} frames, seed {seed}.", "", *HEADER, *lines])
    path.write_text(f"{before}<!-- table -->\n\n{table}\n\n<!-- end of table -->{after}")


if __name__ == "__main__":
    sys.exit(main())
