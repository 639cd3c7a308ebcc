"""How many kernels a step hands to a GPU: counted in compiled graphs, not on a GPU.

``python benchmarks/step_launches.py --by-block`` prints the table below, for LoRA on all linear layers of a Llama; a
test holds it. Other models and adapters have other numbers; what packs add is the same, as it lies in attention.
"""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

from macft.model.execution import Execution
from macft.model.packing import attends_under_mask
from macft.planner.memory import trained_part
from macft.planner.memory_planner import MemoryPlanner


class StepKernels(NamedTuple):
    """Kernels of a step beside its blocks; of a block with a backward pass; of one without."""

    step: int
    trained: int
    frozen: int


COUNTED = {
    ("metal", "padded", "none"): StepKernels(30, 102, 18),
    ("metal", "padded", "cheap"): StepKernels(30, 112, 18),
    ("metal", "padded", "blocks"): StepKernels(30, 131, 18),
    ("metal", "mask", "none"): StepKernels(37, 103, 19),
    ("metal", "mask", "cheap"): StepKernels(37, 113, 19),
    ("metal", "mask", "blocks"): StepKernels(37, 133, 19),
    ("metal", "rows", "none"): StepKernels(46, 135, 35),
    ("metal", "rows", "cheap"): StepKernels(46, 157, 35),
    ("metal", "rows", "blocks"): StepKernels(46, 181, 35),
    ("cuda", "padded", "none"): StepKernels(30, 102, 16),
    ("cuda", "padded", "cheap"): StepKernels(30, 110, 16),
    ("cuda", "padded", "blocks"): StepKernels(30, 129, 16),
    ("cuda", "mask", "none"): StepKernels(40, 104, 16),
    ("cuda", "mask", "cheap"): StepKernels(42, 122, 19),
    ("cuda", "mask", "blocks"): StepKernels(42, 145, 19),
    ("cuda", "rows", "none"): StepKernels(46, 135, 32),
    ("cuda", "rows", "cheap"): StepKernels(46, 155, 32),
    ("cuda", "rows", "blocks"): StepKernels(46, 178, 32),
}
"""By device, how the rows of a batch lie, and what is computed again. Packs attend under one mask, or as rows. Those on
CUDA are of lengths that its fused gradient of attention can't take; of others a block has up to 9 fewer."""
PER_CHUNK = 14
"""Of each further chunk of the loss."""


def step_kernels(planner: MemoryPlanner, execution: Execution) -> float:
    """Of an average step of ``planner``'s node on a GPU; those of a CPU count as on Metal."""
    shape, depth = planner.shape, trained_part(planner.shape, planner.adapter).depth
    device = execution.device if execution.device == "cuda" else "metal"
    chunk = execution.loss_chunk_for(shape.vocabulary)
    total = 0
    for batch in chain.from_iterable(planner.step_batches(execution.micro_batch_size)):
        under_mask = attends_under_mask(batch.tokens, batch.rows, batch.length, shape.head_dim)
        layout = "padded" if not execution.packing else "mask" if under_mask else "rows"
        counted = COUNTED[device, layout, execution.recompute]
        total += counted.step + depth * counted.trained + (shape.blocks - depth) * counted.frozen
        total += PER_CHUNK * max(0, -(-batch.targets // chunk) - 1)
    return total / max(1, len(planner.steps))
