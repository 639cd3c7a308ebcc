"""A plan as tables on the terminal, and as lines where it is too narrow for them."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from macft.planner.memory import MemoryParts
from macft.planner.placement.compare import LayoutDecision
from macft.planner.plan.longest_row import LongestRowPlan
from macft.planner.plan.node_plans import NodePlan
from macft.planner.plan.run_plan import RunPlan
from macft.report.durations import duration


def show(plan: RunPlan, console: Console) -> None:
    """Prints memory by node and part, the placements, speed and time, then what the figures rest on."""
    shape = plan.shape
    console.print(
        f"{plan.model}: {shape.parameters / 1e6:,.0f} M parameters, {plan.trainable / 1e6:,.2f} M trained; "
        f"{plan.steps:,} steps of {plan.tokens:,.0f} tokens"
    )
    if plan.refusal is not None:
        console.print(plan.refusal)
    elif plan.chosen != "pipeline":
        _show_memory(plan, console)
    if "pipeline" in plan.placements:
        _show_pipelines(plan, plan.placements["pipeline"], console)
    if plan.placements:
        _show_placements(plan, console)
    for line in plan.advice:
        console.print(f"> {line}")
    for note in plan.notes:
        console.print(f"· {note}")
    console.print("· memory is MLX's peak, within 17% where it was measured (docs/plan.md); speed is a rough estimate")


def show_longest_rows(plan: LongestRowPlan, console: Console) -> None:
    """Prints the longest row that fits each node, then what the figures rest on."""
    console.print(
        f"{plan.model}: {plan.trainable / 1e6:,.2f} M parameters trained, one row at a time, all of it targets"
    )
    if plan.unknown:
        console.print(plan.unknown)
        return
    table = _table("longest row that fits, tokens, by what the backward pass computes again (training.recompute)")
    table.add_column("node", overflow="fold", min_width=6)
    _numbers(table, "available, GB", *plan.nodes[0].macft, "mlx_lm", "mlx_lm --grad-checkpoint")
    for node in plan.nodes:
        lengths = (*node.macft.values(), node.mlx_lm["none"], node.mlx_lm["blocks"])
        table.add_row(node.node, f"{node.budget / 1e9:.1f}", *(_tokens(length, plan.limit) for length in lengths))
    _print(table, console)
    for note in plan.notes:
        console.print(f"· {note}")
    console.print("· within 15% of the memory where it was measured, on a CPU (docs/plan.md); no Mac was measured")


def _tokens(length: int, limit: int) -> str:
    if not length:
        return "-"
    return f"{'>= ' if length == limit else ''}{length:,}"


def _table(title: str) -> Table:
    return Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False, padding=(0, 1, 0, 0))


def _print(table: Table, console: Console) -> None:
    """Prints ``table``; where its columns don't fit, a line for each row: its first cell, then the others by name."""
    unlimited = console.options.update(width=10_000, max_width=10_000)
    if console.measure(table, options=unlimited).minimum <= console.width:
        console.print(table)
        return
    console.print(table.title or "")
    names = [str(column.header) for column in table.columns]
    for first, *others in zip(*(column.cells for column in table.columns), strict=True):
        named = ", ".join(f"{name} {cell}" for name, cell in zip(names[1:], others, strict=True) if cell != "-")
        console.print(Padding(f"{first}: {named}", (0, 0, 0, 2)))


def _numbers(table: Table, *names: str) -> None:
    """Columns that are never narrower than their content."""
    for name in names:
        table.add_column(name, justify="right", no_wrap=True, min_width=len(name))


def _show_memory(plan: RunPlan, console: Console) -> None:
    """Memory of each node with the whole model."""
    table = _table("memory of each node with the whole model, GB")
    table.add_column("node", overflow="fold", min_width=6)
    _numbers(table, "weights", "trained", "activations", "rest", "peak", "available")
    table.add_column("fits", no_wrap=True)
    _numbers(table, "rows")
    for node in plan.nodes:
        parts, unknown = node.parts, node.parts.unknown
        table.add_row(
            node.name,
            _gb(parts.weights),
            _gb(parts.adapter + parts.optimizer + parts.gradients),
            "?" if unknown else _gb(parts.activations + parts.logits),
            _gb(parts.overhead),
            f"{'> ' if unknown else ''}{_gb(parts.peak)}",
            f"{node.budget / 1e9:.1f}",
            "no" if node.refusal is not None else "?" if unknown else "yes",
            str(node.rows),
        )
    _print(table, console)
    for node in plan.nodes:
        console.print(f"{node.name}: {node.layout.line}; {_settings(node)}")
    for node in plan.nodes:
        if node.refusal is not None:
            console.print(f"{node.name}: {node.refusal}")
        if node.parts.unknown:
            console.print(f"{node.name}: {node.parts.unknown}")


def _show_pipelines(plan: RunPlan, decision: LayoutDecision, console: Console) -> None:
    """Which node has which blocks."""
    table = _table("pipeline: blocks and memory of each node, GB")
    table.add_column("node", overflow="fold", min_width=6)
    table.add_column("blocks", no_wrap=True)
    _numbers(table, "weights", "trained", "activations", "rest", "peak", "available", "busy")
    pairs = zip(decision.layout.pipelines, decision.choices, decision.micro_batches, strict=True)
    for number, (stages, choices, count) in enumerate(pairs):
        for stage, choice in zip(stages, choices, strict=True):
            node = plan.nodes[stage.rank]
            busy = count * choice.cost.busy / max(1e-12, decision.seconds - decision.exchange)
            table.add_row(
                node.name,
                f"{stage.first}-{stage.end - 1}",
                *_stage_memory(plan.stages.get(stage.rank, node.parts)),
                f"{node.budget / 1e9:.1f}",
                f"{busy:.0%}",
                end_section=stage is stages[-1] and number + 1 < len(decision.layout.pipelines),
            )
    _print(table, console)
    for number, count in enumerate(decision.micro_batches):
        which = f"pipeline {number + 1}: " if len(decision.micro_batches) > 1 else "pipeline: "
        names = " > ".join(plan.nodes[stage.rank].name for stage in decision.layout.pipelines[number])
        console.print(f"{which}{names}, {count} micro-batch{'es' if count > 1 else ''} a step")
    pairs = zip(decision.layout.pipelines, decision.choices, decision.micro_batches, strict=True)
    for stages, choices, count in pairs:
        for stage, choice in zip(stages, choices, strict=True):
            node = plan.nodes[stage.rank]
            if choice.reading > 0 and choice.memory is None:
                console.print(f"{node.name}: {node.layout.line}")
            elif choice.reading > 0:
                console.print(
                    f"{node.name}: {choice.resident} of its {len(stage.blocks)} blocks stay in memory, the others are "
                    f"read from disk for each micro-batch, {count * choice.reading:.1f} s a step"
                )


def _stage_memory(parts: MemoryParts) -> list[str]:
    """Weights, trained, activations, rest and peak."""
    trained = parts.adapter + parts.optimizer + parts.gradients
    activations = parts.activations + parts.logits
    known = [*map(_gb, (parts.weights, trained, activations, parts.overhead, parts.peak))]
    if parts.unknown:
        known[-1] = f"> {known[-1]}"
    return known


def _show_placements(plan: RunPlan, console: Console) -> None:
    """Speed and time of each placement that fits."""
    table = _table("estimate; exchange, wire and disk in seconds a step")
    table.add_column("placement", no_wrap=True, min_width=len("replicate *"))
    _numbers(table, "tokens/s", "s/step", "idle", "exchange", "wire", "disk", "whole run")
    watts = [node.watts for node in plan.nodes]
    if all(value is not None for value in watts):
        _numbers(table, "kWh")
    for name, decision in sorted(plan.placements.items(), key=lambda item: item[1].seconds):
        row = [
            f"{name}{' *' if name == plan.chosen and len(plan.placements) > 1 else ''}",
            f"{plan.tokens / decision.seconds:,.0f}",
            f"{decision.seconds:.2f}",
            f"{decision.bubble:.0%}",
            *(_seconds(value) for value in (decision.exchange, decision.wire, decision.disk)),
            duration(decision.seconds * plan.steps),
        ]
        if all(value is not None for value in watts):
            used = sum(watts[rank] or 0.0 for rank in decision.ranks)
            row.append(f"{used * decision.seconds * plan.steps / 3.6e6:.3f}")
        table.add_row(*row)
    _print(table, console)
    if len(plan.placements) > 1 and plan.chosen is not None:
        console.print(f"* the run's placement. Others: topology.placement={'|'.join(plan.placements)}")


def _settings(node: NodePlan) -> str:
    execution = node.execution
    words = [f"micro-batch {execution.micro_batch_size or 'all'}"]
    words += [f"recompute {execution.recompute}"] if execution.recompute != "none" else []
    words += [f"chunks of {execution.loss_chunk}"] if execution.loss_chunk else []
    return ", ".join(words)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value else "-"
