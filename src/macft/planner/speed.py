"""How long a step would take on a node, from the operations it needs. An estimate, not a promise."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

# isort: split
import mlx.core as mx

from macft.device.chips import Chip, own_chip
from macft.device.kind import Device
from macft.device.training_speed import TrainingSpeed, nearest
from macft.model.execution import Execution
from macft.model.packing import attention_size
from macft.planner.memory import trained_part
from macft.planner.memory_planner import MemoryPlanner
from macft.planner.workload import DeviceBatchShape

# Share of the peak that LoRA training reaches on Macs: from speeds people report, 0.39 (Mistral-7B, M1 Max), 0.49
# (Llama-7B, M2 Ultra) and 0.59 (Qwen3-0.6B, M4 Pro) of the FP32 peak.
MAC_EFFICIENCY = 0.45
# Share of the matrix-product speed that a step of SmolLM2 reaches on a CPU, with 4 to 16 SQL rows: 0.46 to 0.54 on one
# core, 0.34 to 0.44 on two, where all but the large products is one core's work.
CPU_EFFICIENCY = 0.42
# Share of the estimated peak of an M5's matrix units. A guess: no training on them was published. Apple reports that an
# M5 reads prompts, which is matrix products as training is, 3.3 to 4.1 times as fast as an M4
# (machinelearning.apple.com, "Exploring LLMs with MLX and the Neural Accelerators in the M5 GPU", 2025). That would be
# 0.4 of this peak; but a training step has more besides its products. With 0.25, an M5 trains 2.1 times as fast.
MATRIX_EFFICIENCY = 0.25
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
    pairs = sum(attention_size(batch.tokens, batch.rows, batch.length, head_dim).scores for batch in batches)
    return 4.0 * query * pairs, 8.0 * query * pairs


@dataclass(frozen=True)
class OwnSpeed:
    """Operations a second that training reaches on this machine, and in words where that is from."""

    operations_per_second: float
    origin: str


def own_speed(work: float, execution: Execution) -> OwnSpeed:
    """This machine's for a step of ``work`` (see :func:`work_of`), computed as ``execution`` says.

    As ``macft bench --training`` measured it, otherwise :func:`expected_speed`.
    """
    measured = measured_speed(work, execution)
    if measured is None:
        return expected_speed(execution)
    return OwnSpeed(measured.speed, f"measured by macft bench --training ({measured.case})")


def work_of(planner: MemoryPlanner) -> float:
    """Parameters times tokens of an average step of ``planner``'s node: what the speed of a step depends on most."""
    tokens = sum(float(step.lengths.sum()) for step in planner.steps) / max(1, len(planner.steps))
    return planner.shape.parameters * max(1.0, tokens)


def measured_speed(work: float, execution: Execution) -> TrainingSpeed | None:
    """The case most like a step of ``work`` that ``macft bench --training`` measured here; None if there is none."""
    return nearest(Device.default().kind, work, execution.bits)


def expected_speed(execution: Execution) -> OwnSpeed:
    """This machine's where training was not measured: of its chip, or from a matrix product of 0.3 s in float32."""
    device = Device.default().kind
    chip = own_chip() if device == "metal" else None
    if chip is not None:
        return OwnSpeed(chip_speed(chip, execution.dtype), "estimated for its chip; macft bench --training measures it")
    efficiency = CPU_EFFICIENCY if device == "cpu" else MAC_EFFICIENCY
    # The first measurement is also what makes a resting processor run at its full speed.
    flops = max(measured_flops() for _ in range(2))
    return OwnSpeed(flops * efficiency, "from a matrix product of 0.3 s; macft bench --training measures training")


def chip_speed(chip: Chip, dtype: str) -> float:
    """Operations a second that training reaches on a Mac with ``chip``; matrix units have no part in float32."""
    speed = chip.tflops * MAC_EFFICIENCY
    if chip.matrix_tflops is not None and dtype != "float32":
        speed = max(speed, chip.matrix_tflops * MATRIX_EFFICIENCY)
    return speed * 1e12


def measured_flops() -> float:
    """Float32 matrix-product speed of MLX's default device, operations a second: the best seen within 0.3 s."""
    matrix = mx.ones((_PROBE, _PROBE))
    best, begun = 0.0, time.perf_counter()
    while not best or time.perf_counter() - begun < _PROBE_SECONDS:
        started = time.perf_counter()
        mx.eval(matrix @ matrix)
        best = max(best, 2 * _PROBE**3 / (time.perf_counter() - started))
    return best
