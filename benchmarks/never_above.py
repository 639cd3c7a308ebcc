"""Peak MLX memory of one step of small models, macft's MLX operations beside mlx_lm's: the highest ratios.

    python benchmarks/never_above.py [--cases 60] [--seed 0] [--compiled|--not-compiled]

Models are narrow, wide, deep or of one block, in float32, bfloat16 and 4 bits; rows are short and long, all tokens are
targets, half or few; LoRA is on all blocks or on one, of rank 8 or 64, or it is DoRA (`harness/step_peaks.py`). So many
cases are drawn, the first two always being 2 rows of 200 tokens in bfloat16. Each side is a step as its trainer makes
it, the update included; its peak is taken beside the model's weights, which are the same for both. A line for each case
above 1.00, and then the highest ratio of each group. Compiled steps need a C++ compiler on a CPU.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict

from harness.step_peaks import ADAPTERS, FORMS, MODELS, TARGETS, StepCase, step_peaks
from harness.step_sides import SIDES

ROWS = ((1, 16), (1, 64), (2, 33), (4, 64), (2, 200), (8, 48), (1, 300))
# MLX multiplies quantised matrices slowly on a CPU.
MOST_TOKENS = {"4 bits": 130}


def draw(count: int, seed: int, compiled: list[bool]) -> list[StepCase]:
    """So many cases, the same for the same seed."""
    chosen = random.Random(seed)
    cases = [StepCase(vocabulary=vocabulary, compiled=compiled[0]) for vocabulary in ("small", "large")]
    while len(cases) < count:
        form = chosen.choice(list(FORMS))
        rows, tokens = chosen.choice([each for each in ROWS if each[0] * each[1] <= MOST_TOKENS.get(form, 400)])
        cases.append(
            StepCase(
                model=chosen.choice(list(MODELS)),
                vocabulary="small" if form in MOST_TOKENS else chosen.choice(("small", "large")),
                form=form,
                adapter=chosen.choice(list(ADAPTERS)),
                rows=rows,
                tokens=tokens,
                targets=chosen.choice(list(TARGETS)),
                compiled=chosen.choice(compiled),
            )
        )
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--compiled", dest="compiled", action="store_const", const=[True], default=[False, True])
    way.add_argument("--not-compiled", dest="compiled", action="store_const", const=[False])
    options = parser.parse_args()
    highest: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for case in draw(options.cases, options.seed, options.compiled):
        peaks = step_peaks(case)
        ratios = [peaks[side] / peaks["mlx_lm"] for side in SIDES[1:]]
        group = "compiled" if case.compiled else "not compiled", case.adapter
        highest[group] = [max(pair) for pair in zip(highest[group], ratios, strict=True)]
        counts[group] += 1
        if max(ratios) > 1:
            print(f"{case}: {', '.join(f'{ratio:.3f}' for ratio in ratios)}", flush=True)
    print("\n| step | adapter | cases | none | cheap | blocks |\n| --- | --- | ---: | ---: | ---: | ---: |")
    for group in sorted(highest):
        print(f"| {' | '.join(group)} | {counts[group]} | {' | '.join(f'{ratio:.2f}' for ratio in highest[group])} |")


if __name__ == "__main__":
    main()
