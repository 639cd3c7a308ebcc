"""Peak memory of a run whose blocks are read from disk, from that of the same run with recomputed blocks in memory."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import NamedTuple

from macft.errors import ConfigError
from macft.model.adapters.settings import AdapterConfig
from macft.model.blocks.ends import BOTH_ENDS
from macft.model.execution import Execution
from macft.model.shape import ModelShape
from macft.planner.memory import ComputeShape, MemoryParts, predict, recomputed_inputs, trained_part
from macft.planner.memory_planner import MemoryPlanner
from macft.training.gradients.staged import VALIDATION_TOKENS

# The block that is computed, and the next one, which is read meanwhile.
_IN_FLIGHT = 2
# The sums of all blocks, and the gradient of one.
GRADIENTS = 1.2
# What an update takes beside the adapter and the optimizer's states, as multiples of the adapter: the gradient, and new
# values and long arrays of small ones beside the old. Measured in runs with little else in memory.
_UPDATE = 6.0
# What is inside a block that is read or a stage's, against one of those that are all held, for kinds of blocks whose
# memory is taken from a graph: fitted to one mixture (tests/test_streaming.py).
_READ_BLOCK = 1.2
# What a block of an unknown kind has inside, as a multiple of its input.
UNKNOWN_INSIDE = 16.0


class Inside(NamedTuple):
    """Bytes that exist only while a block is computed again and backward; ``unknown``: why they are a guess."""

    size: float
    unknown: str | None = None


def inside_of_block(
    shape: ModelShape, execution: Execution, adapter: AdapterConfig, optimizer: str, work: ComputeShape
) -> Inside:
    """That of the largest block of ``work``, beside its input.

    Where recomputed blocks aren't predicted it is all that the last block takes, if that one alone is trained and
    nothing is computed again.
    """
    whole = replace(execution, placement="replicate", resident_blocks=(), recompute="blocks")
    parts = predict(shape, whole, adapter, optimizer, work)
    if not parts.unknown:
        depth = trained_part(shape, adapter).depth
        return Inside(max(0.0, parts.activations - recomputed_inputs(shape, whole, depth, work.tokens)))
    alone = replace(adapter, layers=[shape.blocks - 1], num_layers=-1)
    unknown: str | None = parts.unknown
    try:
        last = predict(shape, replace(whole, recompute="none"), alone, optimizer, work)
        if not last.unknown:
            return Inside(_READ_BLOCK * last.activations)
        unknown = last.unknown
    except ConfigError:  # the last block has none of the layers that are trained
        pass
    return Inside(UNKNOWN_INSIDE * shape.hidden * execution.weight_format.float_bytes * work.tokens, unknown)


def streamed_parts(planner: MemoryPlanner, execution: Execution) -> MemoryParts:
    """The peak by part. Activations are hidden states at the borders of blocks, of all rows, and one block's inside."""
    together = planner.step_batches(execution.micro_batch_size)
    if planner.one_by_one:
        together = planner.micro_batches(execution.micro_batch_size)
    tokens = max((sum(batch.tokens for batch in each) for each in together), default=1)
    works = planner.largest_works(execution)
    return max((_parts(planner, execution, work, tokens) for work in works), key=lambda parts: parts.peak)


def _parts(planner: MemoryPlanner, execution: Execution, work: ComputeShape, step_tokens: int) -> MemoryParts:
    shape, trained = planner.shape, trained_part(planner.shape, planner.adapter)
    resident = replace(execution, placement="replicate", recompute="blocks")
    parts = predict(shape, resident, planner.adapter, planner.optimizer, work, by_block=True)
    held = held_weights(shape, execution)
    border = shape.hidden * execution.weight_format.float_bytes
    inside = inside_of_block(shape, execution, planner.adapter, planner.optimizer, work)
    # In validation all rows of a group are before the same block.
    share = min(1.0, planner.validation_rows / planner.rows)
    validated = min(VALIDATION_TOKENS, step_tokens * share) * 2 * border
    return replace(
        parts,
        weights=held,
        gradients=min(parts.gradients, 4.0 * GRADIENTS * trained.parameters),
        activations=(trained.depth + 2) * step_tokens * border + inside.size,
        unknown=inside.unknown,
        other_peak=max(
            parts.other_peak - parts.weights + held + validated,
            held + parts.adapter + parts.optimizer + update_bytes(trained.parameters),
        ),
    )


def update_bytes(trained: int) -> float:
    """Bytes that an update of ``trained`` parameters of an adapter takes beside them and the optimizer's states."""
    return 4.0 * _UPDATE * trained


def held_weights(
    shape: ModelShape, execution: Execution, ends: Collection[str] = BOTH_ENDS, blocks: Collection[int] | None = None
) -> float:
    """Most bytes of weights in memory at once, on a node that computes ``ends`` and ``blocks``; None: all."""
    held, stored = execution.weight_format, shape.checkpoint
    sizes, files = shape.block_bytes(held), shape.block_bytes(stored)
    own, resident = range(shape.blocks) if blocks is None else blocks, set(execution.resident_blocks)
    others = sorted((sizes[number] for number in own if number not in resident), reverse=True)
    being_read = 0.0
    same = held.bits == stored.bits and (stored.bits is not None or held.float_bytes == stored.float_bytes)
    if len(resident) < shape.blocks and not same:  # cast or dequantised from the files' form
        being_read = max((files[number] for number in own), default=0.0)
    in_memory = sum(sizes[number] for number in resident) + sum(others[:_IN_FLIGHT])
    return shape.outside_bytes(held, ends) + in_memory + being_read
