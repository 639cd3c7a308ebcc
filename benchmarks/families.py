"""Trains a tiny model of every family of mlx-lm and compares all that macft makes of it with mlx-lm.

python benchmarks/families.py [--family NAME ...] [--check NAME ...]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from harness.families import FAMILIES, build
from harness.family_checks import CHECKS, Case, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", nargs="+", default=FAMILIES)
    parser.add_argument("--check", nargs="+", default=list(CHECKS), choices=list(CHECKS))
    options = parser.parse_args()
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        for family in options.family:
            words = run(Case(family, build(family, Path(folder) / family)), options.check)
            print(f"{family:24}", *(word.split(":")[0] for word in words.values()), flush=True)
            for check, word in words.items():
                if word.startswith("FAILED"):
                    failures += 1
                    print(f"    {check}: {word.removeprefix('FAILED: ')}", flush=True)
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
