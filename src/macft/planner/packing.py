"""Whether packing pays for MLX's operations: by a cost model of operations and kernels, not by default.

Packs have no padding, and compute common prefixes once. But they may need larger attention, more kernels for each layer
and a few more compiled shapes. The CPU's kernels gain from packs in all cases that were measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from macft.model.execution import Execution
from macft.planner.kernels import step_kernels
from macft.planner.memory_planner import MemoryPlanner
from macft.planner.speed import step_cost


@dataclass(frozen=True)
class PackingCosts:
    """What a step takes on one kind of device; the same for all of them, so that like nodes choose alike.

    ``pays``: packs are chosen where their predicted time is at most this share of that of padded rows.
    """

    operations_per_second: float
    kernel_seconds: float
    pays: float

    def seconds(self, operations: float, kernels: float) -> float:
        """Of a step with so many floating-point operations in so many kernels."""
        return operations / self.operations_per_second + kernels * self.kernel_seconds


COSTS = {
    # 0.45 of the peak of an M2 Max, as in planner/speed.py; other Macs are between a fifth of that and twice as fast.
    # 3,200 small kernels that wait for one another took 8.8 ms on an M3 Ultra (mlx 0.32.2,
    # github.com/ml-explore/mlx/issues/4521). Not measured by macft: packs have to save a twentieth.
    "metal": PackingCosts(6.1e12, 2.75e-6, 0.95),
    # From two steps of padded rows that an H100 took: 36 ms for 2,130 kernels with 1.34e12 operations (1B, sql), and
    # 152 ms for 2,600 with 49.5e12 (8B, long). Steps of packs took up to 1.4 times what this predicts
    # (benchmarks/training.md), and have to be predicted as much faster.
    "cuda": PackingCosts(443e12, 15.5e-6, 0.7),
    # MLX's operations on a CPU: nothing is handed over, and the speed cancels out.
    "cpu": PackingCosts(1e12, 0.0, 0.95),
}


def choose_packing(planner: MemoryPlanner) -> tuple[Execution, list[str]]:
    """``planner.execution``, with padded rows where packing was left to macft and does not pay; lines for the user.

    ``planner.steps`` must be the global batches, so that all nodes, of any number, choose alike.
    """
    execution = planner.execution
    if not execution.packing or execution.requires_packing or execution.kernels == "cpu":
        return execution, []
    costs, padded = COSTS[execution.device], execution.padded()
    packs, rows = (_seconds(costs, replace(planner, execution=each), each) for each in (execution, padded))
    if packs <= costs.pays * rows:
        return execution, []
    return padded, [
        f"training.packing=auto: rows are padded; by count, packs would take {packs / rows:.2f} of the time"
    ]


def _seconds(costs: PackingCosts, planner: MemoryPlanner, execution: Execution) -> float:
    return costs.seconds(step_cost(planner, execution).operations, step_kernels(planner, execution))
