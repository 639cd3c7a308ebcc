"""The layout of a pipeline, and what a stage of it takes of a node's memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

from macft.errors import ConfigError
from macft.model.blocks.ends import ends_of
from macft.model.execution import Execution
from macft.parallel.stage_layout import StageLayout, spread
from macft.planner.memory import ComputeShape, MemoryParts, predict, trained_part
from macft.planner.memory_planner import MemoryPlanner
from macft.planner.streamed_memory import GRADIENTS, held_weights, inside_of_block, update_bytes
from macft.training.gradients.pipeline_schedule import holding, in_flight


@dataclass(frozen=True)
class StagePlanner:
    """The memory of ``rank``'s stage in ``layout``, of which ``budget`` bytes may be taken.

    ``first_trained``: the first block that has a backward pass. ``wanted``: ``topology.resident_blocks``. ``may_keep``:
    whether activations may be kept for the backward pass, where there is room.
    """

    planner: MemoryPlanner
    budget: float
    layout: StageLayout
    rank: int
    first_trained: int
    wanted: int | str
    may_keep: bool

    def decide(self) -> Execution:
        """The execution of this node: it keeps as many blocks in memory as fit, those of a larger stage later included.

        And no more than ``wanted``.

        Raises:
            ConfigError: the stage doesn't fit, even with its blocks read from disk.
        """
        blocks = self.planner.shape.blocks
        low, high = -1, blocks if isinstance(self.wanted, str) else min(self.wanted, blocks)
        while low < high:
            middle = -(-(low + high) // 2)
            if self.parts(middle).peak <= self.budget:
                low = middle
            else:
                high = middle - 1
        if low < 0:
            raise ConfigError(
                f"topology.memory_budget: even with its blocks read from disk a stage would need about "
                f"{self.parts(0).peak / 1e9:.2f} GB, and {self.budget / 1e9:.2f} GB are available; fewer or shorter "
                "rows in a micro-batch (training.micro_batch_size, dataset.max_seq_length) need less"
            )
        return self._with(low)

    def parts(self, held: int) -> MemoryParts:
        """The peak by part, with ``held`` blocks in memory."""
        works = self.planner.largest_works(self.planner.execution)
        return max((self._parts(work, held) for work in works), key=lambda parts: parts.peak)

    def predicted(self, execution: Execution) -> MemoryParts:
        """The peak by part of ``execution``, one that :meth:`decide` returned."""
        blocks, from_end = self._stage
        parts, trained = self.parts(min(execution.block_capacity, len(blocks))), self._trained
        can_keep = execution.block_capacity >= len(blocks)
        held, keeps = holding(execution, from_end, trained, can_keep=can_keep)
        if keeps:
            more = held * trained * self._activations_of_block
        else:
            more = (held - in_flight(from_end)[0]) * (1 + trained) * self._border
        return replace(parts, activations=parts.activations + more)

    def read_bytes(self, execution: Execution) -> float:
        """What is read from disk in an average step of ``execution``: a block's file, forward and again backward.

        The block that a micro-batch ends with is the first one of its way back, and the first block that a forward pass
        needs may be in memory from the backward pass before; neither is counted off.
        """
        shape, blocks = self.planner.shape, self._stage[0]
        resident = set(spread(blocks, min(len(blocks), execution.block_capacity)))
        sizes = shape.block_bytes(shape.checkpoint)
        reads = sum((1 + (block >= self.first_trained)) * sizes[block] for block in blocks if block not in resident)
        batches = self.planner.step_batches(self.planner.execution.micro_batch_size)
        passes = sum(map(len, batches)) / max(1, len(batches))
        return reads * passes

    @property
    def _stage(self) -> tuple[range, int]:
        """This rank's blocks, and how many stages are left from its own on."""
        place = self.layout.place_of(self.rank)
        if place is None:
            return range(0), 0
        pipeline = self.layout.pipelines[place[0]]
        return pipeline[place[1]].blocks, len(pipeline) - place[1]

    @property
    def _ends(self) -> frozenset[str]:
        """The ends of the model that it computes."""
        blocks, from_end = self._stage
        return ends_of(is_first=bool(blocks) and blocks.start == 0, is_last=from_end == 1)

    @property
    def _trained(self) -> int:
        """How many of its blocks have a backward pass."""
        return sum(block >= self.first_trained for block in self._stage[0])

    @property
    def _border(self) -> float:
        """Bytes of the hidden states of the largest micro-batch."""
        planner = self.planner
        tokens = max(work.tokens for work in planner.works(planner.execution))
        return float(planner.shape.hidden * planner.execution.weight_format.float_bytes * tokens)

    def _with(self, capacity: int) -> Execution:
        blocks, from_end = self._stage
        held = self.planner.execution.pipelined(capacity, tuple(spread(blocks, capacity)), self._ends)
        room = max(0.0, self.budget - self.parts(min(capacity, len(blocks))).peak)
        one = self._activations_of_block
        return replace(
            held,
            activation_capacity=int(room / one) if self.may_keep and one else 0,
            border_capacity=in_flight(from_end)[0] * (1 + self._trained) + int(room / self._border),
        )

    def _tried(self, parts: MemoryParts) -> float:
        """Bytes while the model's code is tried block by block, with both ends, before any block is held."""
        return held_weights(self.planner.shape, replace(self.planner.execution, resident_blocks=())) + parts.adapter

    @property
    def _activations_of_block(self) -> float:
        """Bytes that a block of one micro-batch keeps for its backward pass; 0 where that isn't known."""
        planner = self.planner
        inside = replace(planner.execution, placement="replicate", recompute="none")
        found = [
            predict(planner.shape, inside, planner.adapter, planner.optimizer, work)
            for work in planner.largest_works(inside)
        ]
        depth = trained_part(planner.shape, planner.adapter).depth
        return (
            0.0 if any(parts.unknown for parts in found) else max(parts.activations for parts in found) / max(1, depth)
        )

    def _parts(self, work: ComputeShape, count: int) -> MemoryParts:
        planner, (_, from_end) = self.planner, self._stage
        if from_end != 1:  # losses are computed by the last stage
            work = replace(work, targets=0)
        shape, trained = planner.shape, trained_part(planner.shape, planner.adapter)
        inside = replace(planner.execution, placement="replicate", recompute="blocks")
        parts = predict(shape, inside, planner.adapter, planner.optimizer, work, by_block=True)
        # Of a larger stage later it may be any blocks.
        own = self._stage[0] if count <= len(self._stage[0]) else range(shape.blocks)
        resident = replace(planner.execution, resident_blocks=tuple(spread(own, count)))
        held = held_weights(shape, resident, self._ends, own)
        border = shape.hidden * planner.execution.weight_format.float_bytes * work.tokens
        borders = in_flight(from_end)[0] * (1 + self._trained) * border
        one_block = inside_of_block(shape, planner.execution, planner.adapter, planner.optimizer, work)
        return replace(
            parts,
            weights=held,
            gradients=min(parts.gradients, 4.0 * GRADIENTS * trained.parameters),
            activations=borders + one_block.size + 2 * border,
            unknown=one_block.unknown,
            other_peak=max(
                parts.other_peak - parts.weights + held,
                self._tried(parts),
                held + parts.adapter + parts.optimizer + update_bytes(trained.parameters),
            ),
        )
