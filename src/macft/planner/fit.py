"""Whether a run fits a node's memory, with which settings it would, and the choice of ``topology.batch=auto``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from macft.device.mlx_device import on_cpu
from macft.model.adapter_settings import AdapterConfig
from macft.model.backends.mlx.cross_entropy import chunk_size
from macft.model.shape import HeldWeights, ModelShape
from macft.planner.memory import ComputeShape, MemoryParts, predict
from macft.planner.workload import DeviceBatchShape, StepRows
from macft.training.batch_layout import BatchLayout

_EVALUATION_ROWS = 8
_SHORTEST_HINT = 32


@dataclass(frozen=True)
class BatchSettings:
    """What decides how much memory the same step takes. ``loss_chunk`` 0 takes the trainer's own choice."""

    micro_batch_size: int | None
    grad_checkpoint: bool
    loss_chunk: int = 0

    def __str__(self) -> str:
        words = [f"training.micro_batch_size={self.micro_batch_size or 'null'}"]
        words += ["training.grad_checkpoint=true"] if self.grad_checkpoint else []
        words += [f"training.loss_chunk={self.loss_chunk}"] if self.loss_chunk else []
        return " ".join(words)


@dataclass(frozen=True)
class MemoryPlanner:
    """Predicts the peak of a node's part of a run under different settings.

    ``steps`` hold this node's rows, ``validation_rows`` is the size of the validation set (0: no validation).
    ``division`` is that of the trainer's micro-batches. ``eager``: layer by layer, as on a CPU in float32.
    """

    shape: ModelShape
    held: HeldWeights
    adapter: AdapterConfig
    optimizer: str
    steps: Sequence[StepRows]
    validation_rows: int
    division: BatchLayout = field(default_factory=BatchLayout)
    eager: bool = False
    _step_parts: dict[int, list[list[DeviceBatchShape]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def rows(self) -> int:
        """Most rows this node has in a step."""
        return max((len(step.lengths) for step in self.steps), default=1) or 1

    def parts(self, settings: BatchSettings) -> MemoryParts:
        """The prediction for what takes most of all that is computed at once."""
        return max((self._predict(work) for work in self._works(settings)), key=lambda parts: parts.peak)

    def step_parts(self, micro_batch_size: int | None) -> list[list[DeviceBatchShape]]:
        """Of each step, what this node computes one after the other."""
        size = min(micro_batch_size or self.rows, self.rows)
        if size not in self._step_parts:
            self._step_parts[size] = [step.parts(size, self.division) for step in self.steps]
        return self._step_parts[size]

    def _works(self, settings: BatchSettings) -> set[ComputeShape]:
        size = settings.micro_batch_size
        validation_rows = min(size or _EVALUATION_ROWS, self.validation_rows)
        works = {
            ComputeShape(
                rows=part.rows,
                length=part.length,
                tokens=part.tokens,
                targets=part.targets,
                accumulated=len(parts) > 1,
                validation=self._validation(part, validation_rows),
                checkpoint_blocks=settings.grad_checkpoint,
                loss_chunk=chunk_size(self.shape.vocabulary, settings.loss_chunk or None, device=_device()),
                eager=self.eager,
            )
            for parts in self.step_parts(size)
            for part in parts
        }
        return works or {ComputeShape(1, 1, 1, 1)}

    def _validation(self, part: DeviceBatchShape, rows: int) -> float:
        """How many times as much as ``part`` validation computes at once, if its rows are like those of ``part``."""
        most = self.division.max_tokens
        return min(rows / part.rows, math.inf if most is None else max(1.0, most / part.tokens))

    def _predict(self, work: ComputeShape) -> MemoryParts:
        return predict(self.shape, self.held, self.adapter, self.optimizer, work)

    def best(self, start: BatchSettings, budget: float) -> BatchSettings | None:
        """The fastest settings within ``budget`` bytes, None if there are none.

        The largest micro-batch without recomputation first, then checkpointed blocks. What ``start`` asks for stays:
        its micro-batch is not exceeded and its checkpointing not turned off.
        """
        return next((settings for settings in self._candidates(start) if self.parts(settings).peak <= budget), None)

    def _candidates(self, start: BatchSettings) -> Iterator[BatchSettings]:
        most = min(start.micro_batch_size or self.rows, self.rows)
        sizes = [most]
        while sizes[-1] > 1:
            sizes.append(-(-sizes[-1] // 2))
        for checkpoint in [True] if start.grad_checkpoint else [False, True]:
            for size in sizes:
                yield BatchSettings(size, checkpoint, start.loss_chunk)

    def longest_that_fits(self, budget: float) -> int | None:
        """The longest rows that fit under the most saving settings, tokens; None if none do."""
        chunk = chunk_size(self.shape.vocabulary, None, device=_device())
        longest = max((int(step.lengths.max()) for step in self.steps if len(step.lengths)), default=0)
        while longest >= _SHORTEST_HINT:
            longest //= 2
            work = ComputeShape(
                1, longest, longest, longest, True, min(1, self.validation_rows), True, chunk, self.eager
            )
            if self._predict(work).peak <= budget:
                return longest
        return None

    def refusal(self, start: BatchSettings, budget: float, *, auto: bool) -> str | None:
        """Why the run can't be made within ``budget`` bytes and what could, in one line; None if it can."""
        parts = self.parts(start)
        if not auto and parts.peak <= budget:
            return None
        best = self.best(start, budget)
        if best is not None and auto:
            return None
        needs = f"the run would need about {_gb(parts.peak)} and may take {_gb(budget)}"
        if best is not None:
            return f"{needs}; {best} would fit ({_gb(self.parts(best).peak)}), topology.batch=auto picks it by itself"
        longest = self.longest_that_fits(budget)
        if longest is not None:
            return (
                f"{needs}, and no micro-batch fits; dataset.max_seq_length={longest} with training.micro_batch_size=1 "
                "training.grad_checkpoint=true would"
            )
        if self.adapter.type == "full":
            return f"{needs}, and no batch fits; adapter=lora needs far less"
        weights = parts.weights
        if self.held.bits is None and self.shape.weight_bytes(4, 64, self.held.float_bytes) < 0.8 * budget:
            return (
                f"{needs}: the weights alone are {_gb(weights)}; model.quantization=4bit would make them fit on a GPU"
            )
        return (
            f"{needs}: the weights alone are {_gb(weights)}; use a smaller model or a node with more memory "
            "(macft does not split a model's layers over nodes)"
        )


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _device() -> str:
    return "cpu" if on_cpu() else "metal"
