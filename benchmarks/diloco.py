"""Loss curves and bytes of runs that exchange less: DiLoCo and the gradient codecs beside the exact run.

    python benchmarks/diloco.py [--steps 200] [--inner-steps 5,10] [--only exact,int8]
        [--write FILE.md]
        [--plot FILE.png] [OVERRIDE ...]

Each run is `macft.train` of the default recipe on two local nodes, with the same seed and hence the same rows in each
step; OVERRIDES apply to all of them. The validation loss is that of the adapter all nodes share, on the same rows.
Bytes are those rank 0 sent for its steps, without validation and checkpoints. No time is told: two nodes on one machine
share its cores, and their link is memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

NODES = 2


@dataclass(frozen=True)
class Curve:
    """A finished run: validation loss by step, in nats a target token, and bytes that rank 0 sent."""

    name: str
    losses: dict[int, float]
    sent: int


def variants(inner_steps: list[int]) -> dict[str, list[str]]:
    """Overrides by the name of the run; the exact one first."""
    found: dict[str, list[str]] = {"exact": []}
    for count in inner_steps:
        found[f"diloco-{count}"] = ["training.sync=diloco", f"training.inner_steps={count}"]
    for codec in ("bfloat16", "int8", "powersgd"):
        found[codec] = [f"collective.codec={codec}"]
    return found


def run(name: str, overrides: list[str], folder: Path) -> Curve:
    """Trains once; raises SystemExit with the run's own words where it fails."""
    command = [sys.executable, "-m", "macft.train", "+recipe=llama-lora", "topology=local", f"topology.nodes={NODES}"]
    command += ["training.metric_rows=0", "training.export=last", "report.console=false", "report.tensorboard=false"]
    command += [*overrides, f"hydra.run.dir={folder}"]
    environment = {"OPENBLAS_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr.strip()}")
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {event["step"]: event["loss"] for event in events if event["type"] == "evaluated"}
    return Curve(name, losses, sum(event["bytes_sent"] for event in events if event["type"] == "step_done"))


def table(curves: list[Curve]) -> str:
    """Markdown: a row for each run; ratios are to the first one."""
    exact = curves[0]
    steps = sorted(exact.losses)
    lines = [
        f"| run | {' | '.join(f'step {step}' for step in steps)} | last, ratio to exact | MB sent | bytes, ratio |",
        f"| --- | {'--- | ' * len(steps)}--- | --- | --- |",
    ]
    for curve in curves:
        losses = " | ".join(f"{curve.losses[step]:.3f}" for step in steps)
        last = curve.losses[steps[-1]] / exact.losses[steps[-1]]
        share = curve.sent / exact.sent
        lines.append(f"| {curve.name} | {losses} | **{last:.3f}** | {curve.sent / 1e6:.2f} | **{share:.3f}** |")
    return "\n".join(lines)


def plot(curves: list[Curve], path: Path) -> None:
    """Draws validation loss over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for curve in curves:
        axes.plot(list(curve.losses), list(curve.losses.values()), marker=".", label=curve.name)
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss (nats a target token)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Runs what was asked for, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--eval-every", type=int, default=20)
    parser.add_argument("--inner-steps", default="5,10", help="steps between two meetings; divisors of --eval-every")
    parser.add_argument("--only", help="names of runs, with commas; 'exact' is needed for the ratios")
    parser.add_argument("--write", type=Path, help="also write the table there")
    parser.add_argument("--plot", type=Path, help="draw the curves there (needs matplotlib)")
    parser.add_argument("overrides", nargs="*", help="of macft.train, for all runs")
    options = parser.parse_args()
    known = variants([int(count) for count in options.inner_steps.split(",")])
    chosen = options.only.split(",") if options.only else list(known)
    if chosen[0] != "exact" or set(chosen) - known.keys():
        parser.error(f"--only: begin with exact, then any of {', '.join(known)}")
    common = [f"training.steps={options.steps}", f"training.eval_every={options.eval_every}"]
    common += ["training.save_every=0", *options.overrides]
    curves = []
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            curves.append(run(name, [*common, *known[name]], Path(folder) / name))
            print(name, curves[-1].losses, curves[-1].sent, flush=True)
    text = table(curves)
    print(text)
    if options.write:
        options.write.write_text(text + "\n")
    if options.plot:
        plot(curves, options.plot)


if __name__ == "__main__":
    main()
