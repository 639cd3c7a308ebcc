"""Whether packing pays for MLX's operations: by a count of what is computed, not by default.

Packs have no padding, and compute common prefixes once. But they may need larger attention, more operations for each
layer and a few more compiled shapes. The CPU's kernels gain from packs in all cases that were measured.
"""

from __future__ import annotations

from dataclasses import replace

from macft.model.execution import Execution
from macft.planner.fit import MemoryPlanner
from macft.planner.speed import step_cost

PAYS = 0.95
"""Packs are chosen where their floating-point operations are at most this share of those of padded rows.

What packs add to a layer (rows laid out and put back) is 0.3% of its time for an 8B model on an M2 Max and 2% for a
135M one, by bytes and bandwidth. Not measured on a Mac.
"""
PAYS_ON_CUDA = 0.5
"""The same where handing over kernels takes longer than computing them: an H100 with an 8B model took 98 ms for a step
of padded rows, and 111 ms for one of packs with 0.57 of the tokens (benchmarks/training.md)."""


def choose_packing(planner: MemoryPlanner) -> tuple[Execution, list[str]]:
    """``planner.execution``, with padded rows where packing was left to macft and does not pay; lines for the user.

    ``planner.steps`` must be the global batches, so that all nodes, of any number, choose alike.
    """
    execution = planner.execution
    if not execution.packing or execution.requires_packing or execution.kernels == "cpu":
        return execution, []
    padded = execution.padded()
    packs, rows = (step_cost(replace(planner, execution=each), each).operations for each in (execution, padded))
    if packs <= (PAYS_ON_CUDA if execution.device == "cuda" else PAYS) * rows:
        return execution, []
    return padded, [f"training.packing=auto: rows are padded; packs would take {packs / rows:.2f} of the operations"]
