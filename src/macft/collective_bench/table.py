"""The results of a benchmark as tables, JSON and a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.table import Table

from macft.collective_bench.sizes import size_text, speed_text, time_text
from macft.collective_bench.turns import Measured
from macft.errors import MacftError

LATENCY_BYTES = 4
"""The smallest all-reduce; its time is the latency."""
_COLORS = ("#0b6e99", "#d9730d", "#6b6b6b", "#7a4aa0", "#2f855a")


class PlotFailed(MacftError):
    """The plot cannot be drawn or written."""


def build(results: Sequence[Sequence[Measured]], speed: float | None) -> list[Table]:
    """The tables: all figures of the first implementation by size and, if there are others, all medians and ratios.

    Args:
        results: For each size, the results of all implementations.
        speed: Bytes a second of the link, to print the bus bandwidth as a share of it.
    """
    own, *peers = [result.name for result in results[0]]
    figures = _table(["size", f"{own} median", "p95", "algbw GB/s", "busbw GB/s", *(["% of link"] if speed else [])])
    compared = _table(["size", own, *(text for name in peers for text in (name, f"/{own}"))])
    for mine, *others in results:
        words = [time_text(mine.median), time_text(mine.p95)]
        words += [speed_text(mine.algorithm_bandwidth), speed_text(mine.bus_bandwidth)]
        if speed:
            words.append("" if math.isnan(mine.median) else f"{100 * mine.bus_bandwidth / speed:.1f}")
        figures.add_row(size_text(mine.size), *words)
        words = [time_text(mine.median)]
        for other in others:
            ratio = other.ratio_to(mine)
            words += [time_text(other.median), "" if math.isnan(ratio) else f"{ratio:.2f}x"]
        compared.add_row(size_text(mine.size), *words)
    return [figures, compared] if peers else [figures]


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def summary(results: Sequence[Sequence[Measured]], speed: float | None) -> list[str]:
    """Lines with latency, best bus bandwidth and comparison for each implementation, and with failures."""
    lines = []
    for index, name in enumerate(result.name for result in results[0]):
        measured = [row[index] for row in results if row[index].calls]
        if measured:
            best = max(measured, key=lambda result: result.bus_bandwidth)
            line = f"{name}: latency {time_text(measured[0].median)} ({size_text(measured[0].size)})"
            line += f", best bus bandwidth {speed_text(best.bus_bandwidth)} GB/s ({size_text(best.size)})"
            if speed:
                line += f", {100 * best.bus_bandwidth / speed:.1f} % of the link"
            ratios = [row[index].ratio_to(row[0]) for row in results if row[0].calls and row[index].calls]
            if index and ratios:
                line += f"; takes {math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f}x {results[0][0].name}'s time"
                line += " (geometric mean)"
            lines.append(line)
        lines += sorted({row[index].failure for row in results if row[index].failure})
    return lines


def to_plain(results: Sequence[Sequence[Measured]]) -> list[dict[str, object]]:
    """All results for JSON: bytes, seconds, bytes a second; null if nothing was measured."""
    plain = []
    for result in (result for row in results for result in row):
        figures = {
            "median": result.median,
            "p95": result.p95,
            "algorithm_bandwidth": result.algorithm_bandwidth,
            "bus_bandwidth": result.bus_bandwidth,
        }
        known = {key: None if math.isnan(value) else value for key, value in figures.items()}
        plain.append({**asdict(result), **known})
    return plain


def plot(results: Sequence[Sequence[Measured]], path: Path, title: str, speed: float | None) -> None:
    """Plots bus bandwidth over size, a line for each implementation; the suffix of ``path`` sets the format.

    Raises:
        PlotFailed: matplotlib (``pip install 'macft[plot]'``) is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ImportError:
        raise PlotFailed("--plot needs matplotlib: pip install 'macft[plot]'") from None
    # The size that measures the latency would stretch the axis.
    drawn = [row for row in results if row[0].size > LATENCY_BYTES] or results
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, name in enumerate(result.name for result in results[0]):
        points = [(row[index].size, row[index].bus_bandwidth / 1e9) for row in drawn if row[index].calls]
        if not points:
            continue
        color = _COLORS[index % len(_COLORS)]
        width = 2.2 if index == 0 else 1.4
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=color, linewidth=width, label=name)
    if speed:
        axes.axhline(speed / 1e9, color="#999999", linestyle="--", linewidth=1)
        axes.annotate(
            "link", (drawn[0][0].size, speed / 1e9), xytext=(0, 3), textcoords="offset points", color="#777777"
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = [row[0].size for row in drawn]
    axes.set_xticks(sizes, [size_text(size) for size in sizes], rotation=40, ha="right")
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.legend(frameon=False, loc="lower right")
    axes.set_xlabel("array")
    axes.set_ylabel("bus bandwidth, GB/s")
    axes.set_title(title, loc="left")
    axes.grid(visible=True, color="#e5e5e5", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=160)
    except (OSError, ValueError) as error:
        raise PlotFailed(f"--plot: {path} can't be written: {error}") from None
