"""How long a step would take on a node, from the operations it needs. An estimate, not a promise."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

# isort: split
import mlx.core as mx

from macft.model.execution import Execution
from macft.model.packing import scores_at_once
from macft.planner.fit import MemoryPlanner
from macft.planner.memory import trained_part
from macft.planner.workload import DeviceBatchShape

# Share of the peak that LoRA training reaches on Macs: from speeds people report, 0.39 (Mistral-7B, M1 Max), 0.49
# (Llama-7B, M2 Ultra) and 0.59 (Qwen3-0.6B, M4 Pro) of the FP32 peak.
MAC_EFFICIENCY = 0.45
# Share of the matrix-product speed that a step of SmolLM2 reaches on a CPU, with 4 to 16 SQL rows: 0.46 to 0.54 on one
# core, 0.34 to 0.44 on two, where all but the large products is one core's work.
CPU_EFFICIENCY = 0.42
_PROBE, _PROBE_SECONDS = 1024, 0.3


@dataclass(frozen=True)
class StepCost:
    """Floating-point operations of a node's average step, tokens and targets of all its rows."""

    operations: float
    tokens: float
    targets: float


def step_cost(planner: MemoryPlanner, execution: Execution) -> StepCost:
    """The work of ``planner``'s node in a step, averaged over the steps looked at.

    A matrix product counts 2 operations a weight and token going forward and 2 going back to its input; a frozen
    weight has no gradient of its own. For attention see :func:`attention_operations`.
    """
    shape, trained = planner.shape, trained_part(planner.shape, planner.adapter)
    operations = tokens = targets = 0.0
    for step in planner.steps:
        tokens += float(step.lengths.sum())
        targets += step.targets
    for batch in chain.from_iterable(planner.step_batches(execution.micro_batch_size)):
        attention = attention_operations(planner, execution, [batch])
        forward, backward = (2 * shape.block_parameters * batch.tokens + each for each in attention)
        recomputed = trained.depth if execution.recompute == "blocks" or execution.placement == "stream" else 0
        if execution.recompute == "cheap":  # the scores of attention, half of what it computes forward
            operations += attention[0] / 2 * trained.depth
        operations += forward * (shape.blocks + recomputed) + backward * trained.depth
        # The low-rank path forward and back, or the gradients of the weights themselves.
        operations += (2 if planner.adapter.type == "full" else 6) * trained.parameters * batch.tokens
        operations += 4 * shape.embedding_parameters * batch.targets
    steps = max(1, len(planner.steps))
    return StepCost(operations / steps, tokens / steps, targets / steps)


def attention_operations(
    planner: MemoryPlanner, execution: Execution, batches: Sequence[DeviceBatchShape]
) -> tuple[float, float]:
    """Of a block's scores and weighted sums, forward and backward.

    They count the whole square, as MLX computes it while training, or with the CPU's kernels what each token sees, and
    the scores anew going back.
    """
    query = planner.shape.heads * planner.shape.head_dim
    if execution.kernels == "cpu":
        pairs = sum(batch.pairs for batch in batches)
        return 4.0 * query * pairs, 10.0 * query * pairs
    head_dim = planner.shape.head_dim
    pairs = sum(scores_at_once(batch.tokens, batch.rows, batch.length, head_dim) for batch in batches)
    return 4.0 * query * pairs, 8.0 * query * pairs


def measured_flops() -> float:
    """Float32 matrix-product speed of MLX's default device, operations a second: the best seen within 0.3 s."""
    matrix = mx.ones((_PROBE, _PROBE))
    best, begun = 0.0, time.perf_counter()
    while not best or time.perf_counter() - begun < _PROBE_SECONDS:
        started = time.perf_counter()
        mx.eval(matrix @ matrix)
        best = max(best, 2 * _PROBE**3 / (time.perf_counter() - started))
    return best
