"""Where the weights of a node's blocks are during a run: all in memory, or read from disk when they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from macft.errors import ConfigError
from macft.model.adapters.settings import AdapterConfig
from macft.model.execution import Execution
from macft.model.shape import ModelShape
from macft.parallel.stage_layout import spread
from macft.planner.memory import MemoryParts
from macft.planner.memory_planner import MemoryPlanner, batch_overrides
from macft.planner.streamed_memory import streamed_parts
from macft.planner.workload import StepRows, assumed_steps

_SHORTEST_HINT = 32


@dataclass(frozen=True)
class WeightPlacement:
    """Which blocks a node reads in a step: ``forward`` once more than ``backward`` reaches; bytes as in the files."""

    placement: str
    blocks: int
    resident: int
    read_bytes: float

    @classmethod
    def of(cls, shape: ModelShape, execution: Execution, first_trained: int) -> WeightPlacement:
        """The layout of ``execution``; the backward pass reaches block ``first_trained``."""
        if execution.placement != "stream":
            return cls(execution.placement, shape.blocks, shape.blocks, 0.0)
        resident = set(execution.resident_blocks)
        reads = [number for number in range(shape.blocks) if number not in resident]
        reads += [number for number in reads if first_trained <= number < shape.blocks - 1]
        sizes = shape.block_bytes(shape.checkpoint)
        return cls("stream", shape.blocks, len(resident), sum(sizes[number] for number in reads))

    @property
    def line(self) -> str:
        """One line for a person."""
        if self.placement != "stream":
            return f"replicate: all {self.blocks} blocks in memory"
        if self.resident == self.blocks:
            return f"stream: all {self.blocks} blocks fit in memory, so none is read in a step"
        return (
            f"stream: {self.resident} of {self.blocks} blocks stay in memory, the others are read from disk when they "
            f"are needed, {self.read_bytes / 1e9:.2f} GB a step"
        )


@dataclass(frozen=True)
class WholeModelPlanner:
    """Decides a node's placement: ``wanted`` is ``topology.placement``, ``resident`` ``topology.resident_blocks``.

    ``auto``: the node may choose its batch settings. ``budget``: bytes it may take.
    """

    planner: MemoryPlanner
    budget: float
    wanted: str
    resident: int | str
    auto: bool

    def decide(self) -> Execution:
        """The execution of this node.

        Raises:
            ConfigError: nothing that was asked for fits.
        """
        execution, refusal = self.choice()
        if refusal is not None:
            raise ConfigError(refusal)
        return execution

    def choice(self) -> tuple[Execution, str | None]:
        """The execution, and why it can't be, if it can't: a line that begins with the key."""
        planner = self.planner
        own = planner.best(self.budget, sizes=self.auto) or planner.execution
        refusal: str | None = None
        if self.wanted != "stream":
            refusal = planner.refusal(self.budget, auto=self.auto)
            # Smaller micro-batches are the faster way, where they are enough.
            if refusal is None or self.wanted == "replicate" or planner.best(self.budget) is not None:
                return own, _with_key(refusal)
        if (obstacle := self._obstacle) is not None:
            return own, f"topology.placement: {obstacle}" if self.wanted == "stream" else _with_key(refusal)
        streamed = self._streamed()
        if streamed is None:
            return self._with(planner.execution, 0), self._too_large(refusal)
        return streamed, None

    def parts(self, execution: Execution) -> MemoryParts:
        """The memory that ``execution`` takes."""
        if execution.placement != "stream":
            return self.planner.parts(execution)
        return streamed_parts(self.planner, execution)

    @property
    def first_trained(self) -> int:
        """The first block that is trained."""
        return self.planner.first_trained

    @property
    def _obstacle(self) -> str | None:
        planner = self.planner
        obstacle = obstacle_to_reading_blocks(planner.execution, planner.shape, planner.adapter)
        return None if obstacle is None else f"stream {obstacle}"

    def _streamed(self) -> Execution | None:
        """The most resident blocks that fit, with the largest micro-batch among those that allow as many."""
        candidates = self._batches() if self.auto else [self.planner.execution]
        best: Execution | None = None
        for candidate in candidates:
            execution = self._most_resident(candidate)
            if execution is not None and (best is None or len(execution.resident_blocks) > len(best.resident_blocks)):
                best = execution
        return best

    def _batches(self) -> list[Execution]:
        execution, rows = self.planner.execution, self.planner.rows
        sizes = [min(execution.micro_batch_size or rows, rows)]
        while sizes[-1] > 1:
            sizes.append(-(-sizes[-1] // 2))
        return [execution.with_batch(size, execution.recompute) for size in sizes]

    def _most_resident(self, execution: Execution) -> Execution | None:
        if not isinstance(self.resident, str):
            streamed = self._with(execution, self.resident)
            return streamed if self.parts(streamed).peak <= self.budget else None
        low, high = -1, self.planner.shape.blocks
        while low < high:
            middle = -(-(low + high) // 2)
            if self.parts(self._with(execution, middle)).peak <= self.budget:
                low = middle
            else:
                high = middle - 1
        return None if low < 0 else self._with(execution, low)

    def _with(self, execution: Execution, resident: int) -> Execution:
        return execution.streamed(resident_blocks(self.planner.shape.blocks, self.first_trained, resident))

    def _too_large(self, refusal: str | None) -> str:
        resident = 0 if isinstance(self.resident, str) else self.resident
        streamed = self._with(self.planner.execution, resident)
        peak = self.parts(streamed).peak
        size = next((each for each in self._batches() if self.parts(self._with(each, 0)).peak <= self.budget), None)
        would = self._smaller_step()
        if size is not None:
            also_free = "" if self.resident == "auto" else " with topology.resident_blocks=auto"
            would = f"{batch_overrides(size)}{also_free} would fit"
        also = "even with its blocks read from disk " if refusal is not None else "with its blocks read from disk "
        return (
            f"topology.memory_budget: {also}the run would need about {peak / 1e9:.2f} GB, and "
            f"{self.budget / 1e9:.2f} GB are available; {would}"
        )

    def _smaller_step(self) -> str:
        """Fewer or shorter rows that would fit, for a person."""
        planner = self.planner

        def fits(steps: Sequence[StepRows]) -> bool:
            smaller = replace(self, planner=replace(planner, steps=steps))
            one_by_one = planner.execution.with_batch(1, planner.execution.recompute)
            return smaller.parts(smaller._with(one_by_one, 0)).peak <= self.budget

        rows = planner.rows
        while rows > 1:
            rows //= 2
            if fits([StepRows(step.rows[:rows], step.ids[:rows]) for step in planner.steps]):
                each = "1 row" if rows == 1 else f"{rows} rows"
                return (
                    f"{each} for each node in a step (training.batch_size) would fit, with training.micro_batch_size=1"
                )
        length = max((int(step.lengths.max(initial=0)) for step in planner.steps), default=0)
        while length > _SHORTEST_HINT:
            length //= 2
            if fits(assumed_steps(1, length)):
                return f"1 row for each node in a step, of {length} tokens, would fit (dataset.max_seq_length={length})"
        return "a machine with more memory or a smaller model is needed"


def obstacle_to_reading_blocks(execution: Execution, shape: ModelShape, adapter: AdapterConfig) -> str | None:
    """Why the model's blocks can't be read one by one, whenever they are needed; None if they can."""
    bits = execution.bits or execution.fake_quantized_bits
    if bits and shape.checkpoint.bits is None:
        return (
            f"would quantise each block again whenever it is read; quantise the model once, with "
            f"python -m mlx_lm convert --hf-path MODEL -q --q-bits {bits}, or use model.quantization=none"
        )
    if adapter.type == "full":
        return "can't train the model's own weights (adapter.type=full); use adapter=lora"
    return None


def resident_blocks(blocks: int, first_trained: int, count: int) -> tuple[int, ...]:
    """Which ``count`` of the blocks stay in memory.

    First those from ``first_trained`` on, which are read twice a step. They are spread evenly, so that the reads of the
    others lie as far apart as can be.
    """
    twice, once = range(first_trained, blocks), range(first_trained)
    chosen = spread(twice, count) + spread(once, max(0, count - len(twice)))
    return tuple(sorted(chosen))


def _with_key(refusal: str | None) -> str | None:
    return None if refusal is None else f"topology.memory_budget: {refusal}"
