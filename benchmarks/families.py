"""Trains a tiny model of every family that mlx-lm ships, and compares what macft makes of it with mlx-lm.

    python benchmarks/families.py [--family NAME ...] [--check NAME ...] [--write]

A line for each family has a word for each check of ``harness/family_checks.py``: yes, no (mlx-lm can't either, or rows
are padded), - (nothing to check), or FAILED, with the reason below. ``--write`` puts the families that were checked
into the table of docs/models.md. The exit status is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from harness.families import FAMILIES, NOT_TRAINED, REMARKS, build
from harness.family_checks import CHECKS, FAILED, Case, run

PAGE = Path(__file__).parents[1] / "docs/models.md"
BEGIN, END = "<!-- table of families: written by benchmarks/families.py -->\n", "<!-- end of the table -->\n"
COLUMNS = ("family", "LoRA", "experts", "DoRA", "packing", "quantised", "recompute", "split, stream", "remarks")
# The column LoRA says yes where all of these do.
_LORA = ("gradient", "layers", "dropout", "validation", "files", "generate", "fuse")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", default=FAMILIES, choices=FAMILIES, metavar="NAME")
    parser.add_argument("--check", nargs="+", default=list(CHECKS), choices=list(CHECKS), metavar="NAME")
    parser.add_argument("--write", action="store_true", help="put the results into docs/models.md")
    options = parser.parse_args()
    if options.write and options.check != list(CHECKS):
        parser.error("--write needs all checks")
    print(f"{'family':24}", *options.check)
    failures = 0
    if options.write:
        write_table({family: row_of(family, {}) for family in NOT_TRAINED})
    with tempfile.TemporaryDirectory() as folder:
        for family in options.family:
            words = run(Case(family, build(family, Path(folder) / family)), options.check)
            print(f"{family:24}", *(word.split(":")[0] for word in words.values()), flush=True)
            reasons = [f"{check}: {word.removeprefix(FAILED)}" for check, word in words.items() if FAILED in word]
            failures += len(reasons)
            print(*(f"    {reason}\n" for reason in reasons), sep="", end="", flush=True)
            if options.write:
                write_table({family: row_of(family, words)})
    print(f"{len(options.family)} families, {failures} failures")
    return failures > 0


def row_of(family: str, words: dict[str, str]) -> list[str]:
    """The cells of a family's row, from the words of all checks."""
    if family in NOT_TRAINED:
        return [f"`{family}`", "no", *["-"] * (len(COLUMNS) - 3), NOT_TRAINED[family]]
    failed = [check for check, word in words.items() if word.startswith(FAILED)]
    remarks = [REMARKS[family]] if family in REMARKS else []
    if words["layers"] == "targets":
        remarks.append("`adapter.targets` must be given: mlx-lm's default takes a layer whose weight its code reads")
    if words["quantized"] == "no":
        remarks.append("mlx-lm can't compute it quantised")
    if words["dropout"] == "refused":
        remarks.append("no dropout: its code gives layers some tokens of a row only")
    if words["files"] == "macft only":
        remarks.append("mlx-lm can't load adapters of this family, nor its own")
    remarks += [f"wrong: {', '.join(failed)}"] if failed else []

    def cell(*checks: str) -> str:
        found = [words[check] for check in checks]
        return "wrong" if any(word.startswith(FAILED) for word in found) else found[0]

    cells = [
        cell(*_LORA),
        *(cell(check) for check in ("experts", "dora", "packing", "quantized", "recompute", "stream")),
    ]
    return [f"`{family}`", *cells, "; ".join(remarks)]


def write_table(rows: dict[str, list[str]]) -> None:
    """Puts the rows of these families into docs/models.md, and leaves the others."""
    before, rest = PAGE.read_text().split(BEGIN)
    table, after = rest.split(END)
    lines = {line.split("`")[1]: line for line in table.splitlines() if line.startswith("| `")}
    lines |= {family: f"| {' | '.join(cells)} |" for family, cells in rows.items()}
    head = [f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|"]
    body = [lines[family] for family in sorted(lines, key=str.lower)]
    PAGE.write_text(before + BEGIN + "\n" + "\n".join([*head, *body]) + "\n\n" + END + after)


if __name__ == "__main__":
    sys.exit(main())
