"""All that a GPU has to show, in under ten minutes: a step's memory by part, and six cases beside mlx_lm.

    python benchmarks/gpu.py [--minutes 9.5] [--results FILE] [--markdown FILE] [--only WORD ...] [--small]

For CUDA and for Metal. Nothing is downloaded: weights are random, and rows are random tokens of the benchmark's
lengths. Each measurement is a process of its own with a limit of time. One that fails, by lack of memory say, is a line
of the report, and a case that does not fit the machine by the plan is left out. After each measurement the results are
written, to ``--results`` and as tables to ``--markdown`` (by default benchmarks/training.md, between two marks), so
that nothing is lost if this is stopped. Run it again and it goes on with what is missing; ``--again`` begins anew.

1. Kernels are built by whoever needs them first, which takes minutes: models with a quarter of the width make the same
   kernels, several processes at once. Their results are not looked at.
2. Memory after each part of a step of two rows of 1,010 tokens, as in benchmarks/gpu_path.py: the 8B model in bfloat16
   and in 4 bits, 16 adapted blocks.
3. The cases: 1B and 8B, rows of the SQL dataset's lengths, mixed and long rows; 8B in 4 bits. mlx_lm's own trainer, and
   macft as it would compute by itself; with long rows macft with ``training.recompute`` cheap and blocks as well. The
   time is from idle to idle, and holds all steps behind the warm-up.
4. While there is time left, the sides of each case once more, in the other order. Medians are shown.

``--small`` does all of it with models of a few MB, in some minutes on a CPU, to show that this script works.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BEGIN, END = "<!-- written by gpu.py: begin -->", "<!-- written by gpu.py: end -->"
MODELS = {"1B": "Llama-3.2-1B", "8B": "Meta-Llama-3.1-8B"}
# Case: model, rows, bits.
CASES: dict[str, tuple[str, str, int | None]] = {
    "8B long": ("8B", "long", None),
    "8B in 4 bits, long": ("8B", "long", 4),
    "8B sql": ("8B", "sql", None),
    "1B sql": ("1B", "sql", None),
    "8B mixed": ("8B", "mixed", None),
    "1B mixed": ("1B", "mixed", None),
}
# All steps, and those before the time begins.
STEPS = {"sql": (60, 20), "mixed": (60, 20), "long": (12, 3)}
PARTS = {"8B": "8B, bfloat16", "8B@4": "8B, 4 bits"}
PART_SIDES = ("mlx_lm", "cheap", "blocks", "none")
SIDES = {"mlx_lm": "mlx_lm", "macft": "macft", "cheap": "macft, cheap", "blocks": "macft, blocks"}
# Most of the time that one measurement may take, and building the kernels; a Mac needs more --minutes.
LONGEST, LONGEST_WARM_UP = 0.18, 0.3
SMALL = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
Found = dict[str, dict[str, Any]]


def config_for(model: str, width: str) -> dict[str, Any]:
    """config.json of a model, or with ``width`` "quarter" or "small" of a narrower one."""
    from macft.training_bench.random_weights import config_of

    config = config_of(MODELS[model])
    if width == "small":
        return {**config, **SMALL, "head_dim": 16, "num_hidden_layers": 16, "vocab_size": 4096}
    if width == "quarter":
        names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return {**config, "head_dim": head_dim, **{name: config[name] // 4 for name in names}}
    return config


def work(order: dict[str, Any]) -> dict[str, Any]:
    """One side of a case, in this process: figures, or why there are none."""
    from macft.device.mlx_device import keep_within, prepare_device  # before MLX, so that a CPU has its OpenBLAS

    # isort: split
    import mlx.core as mx

    from macft.model.settings import ModelConfig
    from macft.model.shape import shape_of
    from macft.training_bench.cases import Case, plan_training, reason_against
    from macft.training_bench.random_weights import random_model
    from macft.training_bench.rows import random_rows
    from macft.training_bench.sides import Training, mlx_lm_rows, train_macft, train_mlx_lm

    device = prepare_device()
    model, kind, bits = CASES[order["case"]]
    training = Training(kind, *order["steps"])
    case = Case(order["case"], model, kind, bits, config=config_for(model, order["width"]))
    rows = random_rows(kind, training.batch_size * training.steps)
    recompute = order["side"] if order["side"] in ("cheap", "blocks") else "auto"
    held = ModelConfig(precision="checkpoint", quantization="keep")
    plan = plan_training(shape_of(case.model_config, model), held, training, rows, recompute=recompute)
    is_mlx_lm = order["side"] == "mlx_lm"
    if is_mlx_lm and plan.mlx_lm_peak > plan.budget:
        return {"left out": f"would need about {plan.mlx_lm_peak / 1e9:.1f} GB"}
    if not is_mlx_lm and (reason := reason_against(plan)):
        return {"left out": reason}
    made = random_model(case.model_config, bits=bits, dtype=case.dtype)
    mx.reset_peak_memory()
    if is_mlx_lm:
        return {"device": device, **train_mlx_lm(made, mlx_lm_rows(rows), training)}
    keep_within(plan.budget, plan.peak)
    execution = plan.execution
    way = {"recompute": execution.recompute, "packing": execution.packing, "predicted_gb": plan.peak / 1e9}
    return {"device": device, **way, **train_macft(made, rows, training, execution)}


class Measurements:
    """What was measured, by key: kept in a file, and shown as tables in another one."""

    def __init__(self, options: argparse.Namespace):
        self._options = options
        self._end: float = time.monotonic() + 60 * options.minutes
        self._longest = LONGEST * 60 * options.minutes
        kept = options.results.exists() and not options.again
        self.found: Found = json.loads(options.results.read_text()) if kept else {}

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def take(self, key: str, command: list[str]) -> None:
        """Runs ``command``, whose last line is JSON, unless its figures are there already or no time is left."""
        if self.left < 15 or self.found.get(key, {}).keys() - {"failed"}:
            return
        started = time.monotonic()
        self.found[key] = run(command, min(self._longest, self.left))
        seconds = time.monotonic() - started
        says = self.found[key].get("failed") or self.found[key].get("left out") or "measured"
        print(f"{seconds:5.0f} s  {key}: {says}", flush=True)
        self.write()

    def write(self) -> None:
        """Everything so far."""
        from macft.device.durable import write_atomically

        write_atomically(self._options.results, json.dumps(self.found, indent=1) + "\n")
        if (path := self._options.markdown) is None:
            return
        text = path.read_text() if path.exists() else ""
        report = "\n".join([BEGIN, *tables(self.found, self._options.small), END])
        if BEGIN in text and END in text:
            before, rest = text.split(BEGIN, 1)
            text = before + report + rest.split(END, 1)[1]
        else:
            text = f"{text.rstrip()}\n\n{report}\n".lstrip()
        write_atomically(path, text)


def run(command: list[str], limit: float) -> dict[str, Any]:
    """What a process prints last, or why it failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {limit:.0f} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1][:150]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def case_command(case: str, side: str, steps: tuple[int, int], width: str) -> list[str]:
    """A process for one side of a case."""
    order = {"case": case, "side": side, "steps": steps, "width": width}
    return [sys.executable, __file__, "--worker", json.dumps(order)]


def parts_command(shape: str, side: str, tokens: int) -> list[str]:
    """A process for the memory by part."""
    words = ["--shapes", shape, "--worker", side, "--tokens", str(tokens), "--by-part"]
    words += ["--vocabulary", "4096"] if shape.startswith("small") else []
    return [sys.executable, str(HERE / "gpu_path.py"), *words]


def sides_of(case: str) -> list[str]:
    """Who computes a case."""
    return list(SIDES) if CASES[case][1] == "long" else ["mlx_lm", "macft"]


def warm_up_commands() -> Iterator[list[str]]:
    """What needs all kernels, those that have little in common first."""
    for case in ("8B mixed", "8B in 4 bits, long", "8B long", "8B sql", "1B mixed"):
        for side in sides_of(case):
            yield case_command(case, side, (3, 1), "quarter")
    for shape in ("smallx4", "smallx4@4"):
        for side in PART_SIDES:
            yield parts_command(shape, side, 1010)


def warm_up(seconds: float) -> None:
    """Builds the kernels, in several processes at once; for so long at most."""
    started = time.monotonic()

    def build(command: list[str]) -> str | None:
        limit = seconds - (time.monotonic() - started)
        return run(command, limit).get("failed") if limit > 5 else "no time"

    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // 2))) as pool:
        failures = [reason for reason in pool.map(build, list(warm_up_commands())) if reason]
    print(f"{time.monotonic() - started:5.0f} s  kernels", *sorted(set(failures)), sep="\n         ", flush=True)


def tables(found: Found, small: bool) -> list[str]:
    """The report in Markdown."""
    devices = [values["device"] for values in found.values() if "device" in values]
    lines = [f"`python benchmarks/gpu.py`, {time.strftime('%Y-%m-%d')}; {_versions()}; {devices[0] if devices else ''}"]
    lines += ["", "**Models of a few MB: this shows that the script works, and nothing else.**"] * small
    lines += ["", "Memory of a step that is not compiled, two rows: held after each part / most during it, GB beside"]
    lines += ["the weights.", "", "| model | side | forward | loss | first block | other blocks | update |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    for key, values in _of_kind(found, "parts"):
        cells = [values["failed"], "", "", "", ""] if "failed" in values else _parts(values["parts"])
        lines.append(f"| {' | '.join([key[0], key[1], *cells])} |")
    lines += ["", "The cases; ratios are to mlx_lm. `predicted` is the peak that macft's plan expects.", ""]
    lines += ["| case | side | runs | target tokens/s | ratio | median step, ms | peak, GB | ratio | predicted, GB |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for case in CASES:
        base: Mapping[str, float] | None = None
        for side in sides_of(case):
            runs = [values for key, values in _of_kind(found, "case") if key[:2] == [case, side]]
            measured = [values for values in runs if "peak_mlx_gb" in values]
            if runs:
                lines.append(f"| {' | '.join([case, *_case_cells(side, runs, measured, base)])} |")
            if side == "mlx_lm" and measured:
                base = _medians(measured)
    return lines


def _of_kind(found: Found, kind: str) -> Iterator[tuple[list[str], dict[str, Any]]]:
    for key, values in found.items():
        first, *rest = key.split(" / ")
        if first == kind:
            yield rest, values


def _parts(parts: Mapping[str, list[float]]) -> list[str]:
    blocks = [values for name, values in parts.items() if name.startswith("block")]
    others = [max(values) for values in zip(*blocks[1:], strict=True)] or [0, 0]
    columns = [parts["forward"], parts["loss"], blocks[0], others, parts["update"]]
    return [f"{held / 1e9:.3f} / {peak / 1e9:.3f}" for held, peak in columns]


def _medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    names = ("target_tokens_per_second", "median_step_ms", "peak_mlx_gb")
    return {name: statistics.median(values[name] for values in runs) for name in names}


def _case_cells(
    side: str, runs: list[dict[str, Any]], measured: list[dict[str, Any]], base: Mapping[str, float] | None
) -> list[str]:
    if not measured:
        return [SIDES[side], "0", str(runs[-1].get("left out") or runs[-1].get("failed")), *[""] * 5]
    own, first = _medians(measured), measured[0]
    ways = [first.get("recompute", ""), "packs" if first.get("packing") else "padded"] if side == "macft" else []
    speed, peak = own["target_tokens_per_second"], own["peak_mlx_gb"]
    return [
        f"{SIDES[side]} ({', '.join(ways)})" if ways else SIDES[side],
        str(len(measured)),
        f"{speed:,.0f}",
        f"{speed / base['target_tokens_per_second']:.2f}" if base else "",
        f"{own['median_step_ms']:.1f}",
        f"{peak:.2f}",
        f"{peak / base['peak_mlx_gb']:.2f}" if base else "",
        f"{first['predicted_gb']:.2f}" if "predicted_gb" in first else "",
    ]


def _versions() -> str:
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in ("macft", "mlx", "mlx-lm"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything")
    parser.add_argument("--results", type=Path, help="default: gpu-results.json here")
    parser.add_argument("--markdown", type=Path, help="default: training.md beside this script, but not with --small")
    parser.add_argument("--only", nargs="+", help="measurements whose name has one of these words")
    parser.add_argument("--again", action="store_true", help="measure what there are results of, too")
    parser.add_argument("--no-warm-up", action="store_true", help="the kernels are there already")
    parser.add_argument("--small", action="store_true", help="small models, to try this script")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options.worker)))
        return 0
    options.results = options.results or Path(f"gpu-results{'-small' * options.small}.json")
    options.markdown = options.markdown or (None if options.small else HERE / "training.md")
    measurements = Measurements(options)
    if not options.no_warm_up and not options.small:
        warm_up(LONGEST_WARM_UP * measurements.left)

    def take(key: str, command: list[str]) -> None:
        if not options.only or any(word in key for word in options.only):
            measurements.take(key, command)

    for shape, name in PARTS.items():
        for side in PART_SIDES:
            small = parts_command(f"smallx2{shape[2:]}", side, 32)
            take(f"parts / {name} / {side}", small if options.small else parts_command(shape, side, 1010))
    for number in (1,) if options.small else (1, 2, 3):
        for case in CASES:
            for side in sides_of(case)[:: 1 if number % 2 else -1]:
                steps, width = ((2, 1), "small") if options.small else (STEPS[CASES[case][1]], "")
                take(f"case / {case} / {side} / {number}", case_command(case, side, steps, width))
    print("\n".join(tables(measurements.found, options.small)))
    return 0 if any("peak_mlx_gb" in values for values in measurements.found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
