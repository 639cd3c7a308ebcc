"""What Macs that one does not own would do with models of 8B, 32B and 70B in 4 bits: a plan for each, nothing is run.

    python benchmarks/mac_sweep.py [--models 8B 32B 70B] [--counts 1 2 4] [--memories 8 16 24 32 36 48 64]
        [--link ethernet] [--rows 16] [--length 512] [--write]

A row is `macft plan` for so many Macs of one kind, with an adapter on all blocks and rows of so many tokens. The layout
and its speed are those of the fastest placement; what a run would take by itself (topology.placement=auto) is marked
where it is another one. Where nothing fits, the row has the plan's advice. ``--write`` puts the table into
docs/big-models.md. The plan's assumptions are listed there, and in docs/plan.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from macft.config.command_line import prepare
from macft.planner.placement.compare import LayoutDecision
from macft.planner.plan.run_plan import RunPlan, plan_run

MODELS = {
    "8B": "mlx-community/Meta-Llama-3.1-8B-Instruct-4bit",
    "32B": "mlx-community/Qwen3-32B-4bit",
    "70B": "mlx-community/Meta-Llama-3.1-70B-Instruct-4bit",
}
MACS = {8: "M2", 16: "M2", 24: "M2", 32: "M2 Max", 36: "M3 Max", 48: "M3 Max", 64: "M2 Max"}
PAGE, MARKS = Path(__file__).parents[1] / "docs" / "big-models.md", "<!-- mac_sweep.py -->"
HEADER = """\
| model | Macs | placement | tokens/s | s a step | idle | GB of GB | blocks |
| --- | --- | --- | ---: | ---: | ---: | ---: | --- |"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--memories", nargs="+", type=int, choices=MACS, default=list(MACS))
    parser.add_argument("--link", default="ethernet")
    parser.add_argument("--rows", type=int, default=16, help="rows of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        write_rows(Path(scratch), arguments.length)
        print(HEADER)
        for model in arguments.models:
            for count in arguments.counts:
                for memory in arguments.memories:
                    macs = f"{count}x {MACS[memory]} {memory}GB"
                    words = words_of(MODELS[model], macs, arguments, scratch)
                    config = prepare(words).job
                    assert config is not None
                    lines.append(line_of(model, macs, plan_run(config)))
                    print(lines[-1], flush=True)
    if arguments.write:
        before, _, after = PAGE.read_text().split(MARKS)
        PAGE.write_text("\n".join([f"{before}{MARKS}", HEADER, *lines, f"{MARKS}{after}"]))


def write_rows(folder: Path, length: int) -> None:
    """Rows that are longer than ``length`` tokens and are cut there, which share no beginning."""
    for split, count in (("train", 64), ("valid", 2)):
        texts = (f"{n * n} " + "red river lamp north glass stone " * (length // 3) for n in range(count))
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def words_of(model: str, macs: str, arguments: argparse.Namespace, folder: str) -> list[str]:
    """The words after `macft plan`."""
    return [
        "+recipe=llama-lora",
        f"model={model}",
        f"plan.chips=['{macs}']",
        f"plan.link=[{arguments.link}]",
        f"dataset={folder}",
        f"dataset.max_seq_length={arguments.length}",
        f"training.batch_size={arguments.rows}",
        "training.eval_every=0",
        "training.metric_rows=0",
        "adapter.num_layers=-1",
        "topology.batch=auto",
    ]


def line_of(model: str, macs: str, plan: RunPlan) -> str:
    """The row of the table."""
    if not plan.placements:
        refusals = [node.refusal for node in plan.nodes if node.refusal is not None]
        return f"| {model} | {macs} | none fits | - | - | - | - | {(refusals or plan.advice)[0]} |"
    name = min(plan.placements, key=lambda kind: plan.placements[kind].seconds)
    best = plan.placements[name]
    marked = name if name == plan.chosen else f"{name} (auto: {plan.chosen or 'refused'})"
    cells = [
        model,
        macs,
        marked,
        f"{plan.tokens / best.seconds:,.0f}",
        f"{best.seconds:.1f}",
        f"{best.bubble:.0%}",
        memory_of(plan, best),
        blocks_of(plan, best),
    ]
    return "| " + " | ".join(cells) + " |"


def memory_of(plan: RunPlan, best: LayoutDecision) -> str:
    """The most that a node needs, and what it may take."""
    peaks = []
    for rank in best.ranks:
        choice, node = best.choice_of(rank), plan.nodes[rank]
        peaks.append((choice.memory.peak if choice is not None and choice.memory else node.parts.peak, node.budget))
    peak, budget = max(peaks)
    return f"{peak / 1e9:.1f} of {budget / 1e9:.1f}"


def blocks_of(plan: RunPlan, best: LayoutDecision) -> str:
    """Which blocks are where."""
    if best.placement != "pipeline":
        layout = plan.nodes[0].layout
        kept = "" if layout.resident == layout.blocks else f", {layout.resident} in memory"
        return f"all {layout.blocks} on each Mac{kept}"
    texts = []
    for stages, choices in zip(best.layout.pipelines, best.choices, strict=True):
        parts = [
            f"{stage.first}-{stage.end - 1}"
            + (f" ({choice.resident} in memory)" if choice.resident < len(stage.blocks) else "")
            for stage, choice in zip(stages, choices, strict=True)
        ]
        texts.append(" > ".join(parts))
    return "; ".join(texts)


if __name__ == "__main__":
    main()
