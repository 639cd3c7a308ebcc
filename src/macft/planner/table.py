"""A plan as tables on the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from macft.planner.memory import MemoryParts
from macft.planner.run_plan import NodePlan, RunPlan

_PARTS = ("weights", "adapter", "optimizer", "gradients", "activations", "logits", "overhead")


def show(plan: RunPlan, console: Console) -> None:
    """Prints memory by node and part, then speed and time, then what the figures rest on."""
    shape = plan.shape
    console.print(
        f"{plan.model}: {shape.parameters / 1e6:,.0f} M parameters, {plan.trainable / 1e6:,.2f} M trained; "
        f"{plan.steps:,} steps of {plan.tokens:,.0f} tokens"
    )
    table = Table(box=box.SIMPLE_HEAD, title="memory, GB", title_justify="left", pad_edge=False)
    table.add_column("node")
    for name in (*_PARTS, "peak", "may take"):
        table.add_column(name, justify="right")
    table.add_column("fits")
    table.add_column("rows")
    table.add_column("settings")
    for node in plan.nodes:
        unknown = node.parts.unknown
        parts = [_gigabytes(node.parts, name) for name in _PARTS]
        table.add_row(
            node.name,
            *parts,
            f"{'> ' if unknown else ''}{node.parts.peak / 1e9:.2f}",
            f"{node.budget / 1e9:.1f}",
            "no" if node.refusal is not None else "not known" if unknown else "yes",
            str(node.rows),
            _short(node),
        )
    console.print(table)
    for node in plan.nodes:
        console.print(f"{node.name}: {node.layout.line}")
    for node in plan.nodes:
        if node.refusal is not None:
            console.print(f"{node.name}: {node.refusal}")
        if node.parts.unknown:
            console.print(f"{node.name}: {node.parts.unknown}")
    if plan.fits:
        _show_speed(plan, console)
    for note in plan.notes:
        console.print(f"· {note}")
    console.print("· memory is MLX's peak, within 15% where it was measured (docs/plan.md); speed is a rough estimate")


def _show_speed(plan: RunPlan, console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, title="estimate", title_justify="left", pad_edge=False)
    for name in ("tokens/s", "s/step", "of it exchange", "time of the run"):
        table.add_column(name, justify="right")
    row = [
        f"{plan.tokens_per_second:,.0f}",
        f"{plan.step_seconds:.2f}",
        f"{plan.exchange_seconds / plan.step_seconds:.0%}",
        _duration(plan.step_seconds * plan.steps),
    ]
    watts = [node.watts for node in plan.nodes]
    if all(value is not None for value in watts):
        table.add_column("energy of the chips", justify="right")
        joules = sum(value or 0.0 for value in watts) * plan.step_seconds * plan.steps
        row.append(f"{joules / 3.6e6:.3f} kWh")
    table.add_row(*row)
    console.print(table)


def _gigabytes(parts: MemoryParts, name: str) -> str:
    """The part ``name`` in GB, or a question mark."""
    is_known = not parts.unknown or name not in ("activations", "logits")
    return f"{getattr(parts, name) / 1e9:.2f}" if is_known else "?"


def _short(node: NodePlan) -> str:
    execution = node.execution
    words = [f"micro-batch {execution.micro_batch_size or 'all'}"]
    words += [f"recompute {execution.recompute}"] if execution.recompute != "none" else []
    words += [f"chunks of {execution.loss_chunk}"] if execution.loss_chunk else []
    return ", ".join(words)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
