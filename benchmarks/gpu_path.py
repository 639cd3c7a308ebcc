"""Where a training step's memory goes, part by part: macft's portable path and mlx_lm, on whatever device MLX has.

    python benchmarks/gpu_path.py [--shapes SHAPE ...] [--sides SIDE ...] [--rows 2] [--tokens 1010] [--traces]

A shape is NAME[xBLOCKS][@4|@8][/ADAPTED]: the 8B model's, the 1B's, or ``small``, which has the 8B's proportions in an
eighth of its width; with so many blocks; quantised to so many bits (else bfloat16); with adapters on the last so many
blocks (else 16). So ``8Bx2`` are two true blocks of the 8B model, with all of its vocabulary. Sides are mlx_lm, whose
own step is run, and macft with ``training.recompute`` none, cheap and blocks. Each measurement is a process of its own.

The first table is of a step that is not compiled. Its graph is built as a whole, and then evaluated in the order of
its parts, so that what is held after each of them shows: the forward pass, the loss, each block's backward pass (the
first that is computed, and the worst of the others) and the update. ``held`` is active memory after a part and ``peak``
the most during it, both without the weights, in GB. ``KB`` is what is held after the loss, for each token and adapted
block: what the blocks keep for their backward passes. ``operations``: those of the graph, views not counted;
`benchmarks/step_launches.py` counts the kernels of a compiled step, as on a GPU.

The second table is of the step as it is trained, compiled or not: its peak without weights, that as a part of mlx_lm's,
and milliseconds of the fastest of three steps, from idle to idle, which are of no use on a CPU. ``--traces`` adds how
often a step was traced in 16 steps of rows of many lengths.

On a GPU MLX hands over work in advance, and holds the memory of all that is under way: up to 10 graphs, of
``MLX_MAX_OPS_PER_BUFFER`` operations or ``MLX_MAX_MB_PER_BUFFER`` megabytes each. To see what that takes, run this
again with ``MLX_MAX_MB_PER_BUFFER=50``. Kernels are compiled by whoever needs them first: the first process is slow.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from harness.step_sides import SIDES, StepSide, step_side
from macft.data.batch import Batch, collate
from macft.data.formats import Row
from macft.model.adapters.settings import AdapterConfig
from macft.training_bench.random_weights import held_as

# isort: split
import numpy as np

SIZES: dict[str, dict[str, Any]] = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8},
    "small": {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 4, "num_key_value_heads": 1},
}
BLOCKS = {"8B": 32, "1B": 16, "small": 8}
HEAD_DIM = {"8B": 128, "1B": 64, "small": 128}
VOCABULARY = {"8B": 128256, "1B": 128256, "small": 49152}
RANK, SCALE = 8, 20.0


def parse(shape: str) -> tuple[str, int, int | None, int]:
    """Name, blocks, bits and adapted blocks of a shape."""
    found = re.fullmatch(r"(8B|1B|small)(?:x(\d+))?(?:@(4|8))?(?:/(\d+))?", shape)
    if not found:
        sys.exit(f"--shapes: '{shape}' is not NAME[xBLOCKS][@4|@8][/ADAPTED] with 8B, 1B or small as NAME")
    name, blocks, bits, adapted = found.groups()
    count = int(blocks or BLOCKS[name])
    return name, count, int(bits) if bits else None, min(count, int(adapted or 16))


def make_model(shape: str, vocabulary: int | None) -> Any:
    """A frozen model of random weights."""
    import mlx.core as mx
    from mlx_lm.models.llama import Model, ModelArgs

    name, blocks, bits, _ = parse(shape)
    config = {
        "model_type": "llama",
        "num_hidden_layers": blocks,
        "head_dim": HEAD_DIM[name],
        "vocab_size": vocabulary or VOCABULARY[name],
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": name != "8B",
    }
    mx.random.seed(1)
    return held_as(Model(ModelArgs.from_dict(config | SIZES[name])), bits)


def make_batch(options: argparse.Namespace, seed: int = 0) -> Batch:
    """Rows without a prompt, of a few tokens less than asked for, or with ``--traces`` of 16 to that many."""
    generator = np.random.default_rng(seed)
    least = 16 if options.traces else options.tokens - options.tokens // 100
    lengths = generator.integers(least, options.tokens, options.rows, endpoint=True)
    tokens = [generator.integers(1, 4096, length).astype(np.int32) for length in lengths]
    return collate([Row(each, 0) for each in tokens], np.arange(options.rows))


@contextmanager
def side_of(name: str, model: Any, options: argparse.Namespace) -> Iterator[StepSide]:
    """The side ``name``, with an adapter on the last blocks of ``model``."""
    adapter = AdapterConfig(rank=RANK, scale=SCALE, num_layers=parse(options.shape)[3])
    with step_side(name, model, adapter, compiled=options.compiled, packed=options.packed) as side:
        yield side


def by_part(side: StepSide, batch: Batch) -> dict[str, Any]:
    """Peak and active memory of each part of a step that is not compiled, in bytes, without weights."""
    import mlx.core as mx

    from harness.launches import launches
    from macft.model.module_classes import replaced_members

    weights = mx.get_active_memory()
    seen: list[mx.array] = []
    last = side.model.layers[-1]

    def noting(kind: type) -> dict[str, Callable[..., Any]]:
        def call(block: Any, *arguments: Any, **named: Any) -> Any:
            seen.append(kind.__call__(block, *arguments, **named))  # type: ignore[operator]
            return seen[-1]

        return {"__call__": call}

    with replaced_members([last], noting):
        loss, gradient = side.lazy(batch)
    names = [f"layers.{number}." for number in range(len(side.model.layers))]
    blocks = [[value for key, value in gradient.items() if name in key] for name in names]
    parts: dict[str, list[mx.array]] = {"forward": seen[:1], "loss": [loss]}
    parts |= {f"block {n}": values for n, values in reversed(list(enumerate(blocks))) if values}
    found: dict[str, Any] = {}

    def note(part: str) -> None:
        mx.synchronize()
        found[part] = [mx.get_active_memory() - weights, mx.get_peak_memory() - weights]

    seen.clear()
    operations = launches(loss, *gradient.values()).total()
    for part, arrays in parts.items():
        mx.reset_peak_memory()
        mx.eval(arrays)
        note(part)
        arrays.clear()
    mx.reset_peak_memory()
    side.update(gradient)
    note("update")
    return {"parts": found, "operations": operations}


def whole(side: StepSide, options: argparse.Namespace) -> dict[str, Any]:
    """Peak of a step as it is trained, milliseconds of the fastest, and traces."""
    import mlx.core as mx

    if options.traces:
        for seed in range(16):
            side.step(make_batch(options, seed))
        return {"traces": side.traces}
    batch = make_batch(options)
    weights = mx.get_active_memory()
    side.step(batch)
    mx.reset_peak_memory()
    times = []
    for _ in range(options.steps):
        started = time.perf_counter()
        side.step(batch)
        times.append(time.perf_counter() - started)
    return {"peak": mx.get_peak_memory() - weights, "milliseconds": 1000 * min(times)}


def work(options: argparse.Namespace) -> dict[str, Any]:
    """One measurement, in this process."""
    from macft.device.mlx_device import prepare_device  # before MLX, so that a CPU has its OpenBLAS

    # isort: split
    import mlx.core as mx

    device = prepare_device()
    model = make_model(options.shape, options.vocabulary)
    weights = mx.get_active_memory()
    with side_of(options.worker, model, options) as side:
        found = by_part(side, make_batch(options)) if options.by_part else whole(side, options)
    return {"device": device, "weights": weights, **found}


def measured(options: argparse.Namespace, shape: str, side: str, *more: str) -> dict[str, Any]:
    """One measurement in a fresh process."""
    words = ["--shapes", shape, "--worker", side, "--rows", str(options.rows), "--tokens", str(options.tokens)]
    words += ["--steps", str(options.steps)] + (["--packed"] if options.packed else [])
    words += ["--vocabulary", str(options.vocabulary)] if options.vocabulary else []
    done = subprocess.run([sys.executable, __file__, *words, *more], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def show_parts(options: argparse.Namespace, shape: str, sides: list[str]) -> None:
    """The first table."""
    adapted = parse(shape)[3]
    head = "".join(f"{name:>18}" for name in ("forward", "loss", "first block", "other blocks", "update"))
    print(f"\n{shape}, {options.rows} x {options.tokens} tokens, not compiled; held/peak, GB beside the weights")
    print(f"{'':8}{head}{'KB':>8}{'operations':>12}", flush=True)
    for side in sides:
        found = measured(options, shape, side, "--by-part")
        if "failed" in found:
            print(f"{side:8}  {found['failed']}", flush=True)
            continue
        parts = found["parts"]
        blocks = [parts[name] for name in parts if name.startswith("block")]
        others = [max(values) for values in zip(*blocks[1:], strict=True)] or [0, 0]
        columns = [parts["forward"], parts["loss"], blocks[0], others, parts["update"]]
        line = "".join(f"{f'{held / 1e9:.3f}/{peak / 1e9:.3f}':>18}" for held, peak in columns)
        kept = parts["loss"][0] / options.rows / options.tokens / adapted / 1000
        print(f"{side:8}{line}{kept:8.1f}{found['operations']:12}", flush=True)


def show_whole(options: argparse.Namespace, shape: str, sides: list[str]) -> None:
    """The second table."""
    heads = ["weights", "not compiled", "ratio", "compiled", "ratio", "ms", "ratio"] + ["traces"] * options.traces
    print(
        f"\n{shape}, {options.rows} x {options.tokens} tokens, a step as it is trained; peaks in GB beside the weights"
    )
    print(f"{'':8}{''.join(f'{head:>13}' for head in heads)}", flush=True)
    first: list[float] = []
    for side in sides:
        runs = [measured(options, shape, side), measured(options, shape, side, "--compiled")]
        failed = [run["failed"] for run in runs if "failed" in run]
        if failed:
            print(f"{side:8}  {failed[0]}", flush=True)
            continue
        values = [*(run["peak"] / 1e9 for run in runs), runs[1]["milliseconds"]]
        first = first or values
        cells = [f"{runs[0]['weights'] / 1e9:.3f}"]
        for value, base in zip(values, first, strict=True):
            cells += [f"{value:.3f}" if value < 100 else f"{value:.0f}", f"{value / base:.2f}"]
        if options.traces:
            traced = measured(options, shape, side, "--compiled", "--traces")
            cells.append(str(traced.get("traces", "failed")))
        print(f"{side:8}{''.join(f'{cell:>13}' for cell in cells)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["small", "8B", "8B@4"], metavar="SHAPE")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1010, help="of the longest rows")
    parser.add_argument("--vocabulary", type=int, help="another than the model's")
    parser.add_argument("--steps", type=int, default=3, help="how many are timed")
    parser.add_argument("--packed", action="store_true", help="macft's rows are packed, not padded")
    parser.add_argument("--traces", action="store_true", help="count traces")
    parser.add_argument("--no-parts", action="store_true", help="the second table only")
    parser.add_argument("--parts-only", action="store_true", help="the first table only")
    for name in ("--by-part", "--compiled"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for shape in options.shapes:
        parse(shape)
    if options.worker:
        options.shape = options.shapes[0]
        print(json.dumps(work(options)))
        return
    for shape in options.shapes:
        if not options.no_parts:
            show_parts(options, shape, options.sides)
        if not options.parts_only:
            show_whole(options, shape, options.sides)


if __name__ == "__main__":
    main()
