"""Whether a run fits a node's memory, with which settings it would, and the choice of ``topology.batch=auto``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from macft.model.adapters.layers import select_layers
from macft.model.adapters.settings import AdapterConfig
from macft.model.execution import Execution, WeightFormat, recomputations
from macft.model.shape import ModelShape
from macft.planner.memory import ComputeShape, MemoryParts, predict
from macft.planner.workload import DeviceBatchShape, StepRows
from macft.training.batch_layout import BatchLayout

_SHORTEST_HINT = 32
# Of the budget, what a run that recomputes nothing may take where the planner may choose.
_ROOM = 0.5


@dataclass(frozen=True)
class MemoryPlanner:
    """Predicts the peak of a node's part of a run, as configured and with other batch settings.

    ``execution`` is the run's own, ``steps`` hold this node's rows, ``validation_rows`` is the size of the validation
    set (0: no validation). ``one_by_one``: each micro-batch is computed by itself, whatever the placement.
    """

    shape: ModelShape
    execution: Execution
    adapter: AdapterConfig
    optimizer: str
    steps: Sequence[StepRows]
    validation_rows: int
    one_by_one: bool = False
    _step_batches: dict[int, list[list[DeviceBatchShape]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def layout(self) -> BatchLayout:
        """The trainer's own division of micro-batches."""
        return BatchLayout.from_execution(self.execution)

    @property
    def rows(self) -> int:
        """Most rows this node has in a step."""
        return max((len(step.lengths) for step in self.steps), default=1) or 1

    def parts(self, execution: Execution | None = None) -> MemoryParts:
        """The prediction for what takes most of all that is computed at once, with the run's own settings or others."""
        execution = execution or self.execution
        works = self.largest_works(execution)
        return max((self._predict(execution, work) for work in works), key=lambda parts: parts.peak)

    @cached_property
    def first_trained(self) -> int:
        """The first block that is trained."""
        blocks, _ = select_layers(self.adapter, self.shape.adaptable)
        return min(blocks, default=self.shape.blocks)

    def step_batches(self, micro_batch_size: int | None) -> list[list[DeviceBatchShape]]:
        """Of each step, what this node computes one after the other."""
        size = min(micro_batch_size or self.rows, self.rows)
        if size not in self._step_batches:
            self._step_batches[size] = [step.device_batches(size, self.layout) for step in self.steps]
        return self._step_batches[size]

    def micro_batches(self, size: int | None) -> list[list[DeviceBatchShape]]:
        """Of each micro-batch of all steps, what this node computes one after the other."""
        size = min(size or self.rows, self.rows)
        return [part.device_batches(size, self.layout) for step in self.steps for part in step.divided(size)]

    def works(self, execution: Execution) -> set[ComputeShape]:
        """What this node computes at once, each size of it."""
        works = {
            ComputeShape(
                rows=batch.rows,
                length=batch.length,
                tokens=batch.tokens,
                targets=batch.targets,
                parts=batch.parts,
                accumulated=len(batches) > 1,
                validation=self._validation(batch, min(execution.evaluation_rows, self.validation_rows)),
            )
            for batches in self.step_batches(execution.micro_batch_size)
            for batch in batches
        }
        return works or {ComputeShape(1, 1, 1, 1)}

    def largest_works(self, execution: Execution) -> set[ComputeShape]:
        """Those of :meth:`works` that may take most: a few, where a graph is built for each."""
        works = self.works(execution)
        if self.shape.odd_block is None:
            return works
        sizes = (lambda work: work.tokens, lambda work: work.rows * work.length, lambda work: work.targets)
        return {max(works, key=size) for size in sizes}

    def _validation(self, batch: DeviceBatchShape, rows: int) -> float:
        """How many times as much as ``batch`` validation computes at once, if its rows are like those of ``batch``."""
        most = self.execution.pack_tokens
        return min(
            rows / batch.rows, math.inf if most is None else max(1.0, most * self.execution.lanes / batch.tokens)
        )

    def _predict(self, execution: Execution, work: ComputeShape) -> MemoryParts:
        return predict(self.shape, execution, self.adapter, self.optimizer, work)

    def best(self, budget: float, *, sizes: bool = True, asked: bool = True) -> Execution | None:
        """The fastest settings within ``budget`` bytes, None if there are none.

        The largest micro-batch first, each with nothing recomputed and then what is cheap, and checkpointed blocks
        last. ``sizes``: smaller micro-batches may be taken; the run's own is never exceeded. ``asked``: recomputation
        is as the configuration says, where it does; otherwise it is that or more. If recomputation is free, and nothing
        recomputed would take more than half of the budget, what is cheap is recomputed: other programs and errors of
        the prediction need room too.

        Where the peak isn't known the run's own settings stay, and if none whose peak is known fits, the most saving
        ones are returned.
        """
        parts = self.parts()
        if parts.unknown:
            return self.execution.unplanned() if parts.peak <= budget else None
        candidates = list(self._candidates(sizes, asked))
        for one in candidates:
            parts = self.parts(one)
            if not parts.unknown and parts.peak <= budget:
                return self._roomier(one, budget) if parts.peak > _ROOM * budget else one
        return candidates[-1] if parts.unknown and parts.peak <= budget else None

    def _roomier(self, execution: Execution, budget: float) -> Execution:
        """``execution`` with what is cheap recomputed, where the planner may choose that and it fits."""
        if execution.recompute != "none" or "cheap" not in execution.recompute_choices:
            return execution
        cheap = execution.with_batch(execution.micro_batch_size, "cheap")
        return cheap if self.parts(cheap).peak <= budget else execution

    def _candidates(self, sizes: bool, asked: bool) -> Iterator[Execution]:
        execution = self.execution
        rows = [min(execution.micro_batch_size or self.rows, self.rows) if sizes else execution.micro_batch_size]
        while sizes and rows[-1] is not None and rows[-1] > 1:
            rows.append(-(-rows[-1] // 2))
        choices = execution.recompute_choices or (execution.recompute,)
        if not asked:
            every = recomputations(execution.kernels)
            choices = every[every.index(execution.recompute) :]
        for recomputes in ([one for one in choices if one != "blocks"], [one for one in choices if one == "blocks"]):
            for size in rows:
                for recompute in recomputes:
                    yield execution.with_batch(size, recompute)

    def longest_that_fits(self, budget: float) -> int | None:
        """The longest rows that fit under the most saving settings, tokens; None if none do."""
        saving = replace(self.execution, loss_chunk=None).with_batch(1, "blocks")
        longest = max((int(step.lengths.max()) for step in self.steps if len(step.lengths)), default=0)
        while longest >= _SHORTEST_HINT:
            longest //= 2
            work = ComputeShape(1, longest, longest, longest, accumulated=True, validation=min(1, self.validation_rows))
            parts = self._predict(saving, work)
            if parts.unknown:
                return None
            if parts.peak <= budget:
                return longest
        return None

    def refusal(self, budget: float, *, auto: bool) -> str | None:
        """Why the run can't be made within ``budget`` bytes and what could, in one line; None if it can.

        ``auto``: the node may choose its batch settings.
        """
        parts = self.parts()
        if self.best(budget, sizes=auto) is not None:
            return None
        best = self.best(budget, asked=False)
        about = "at least" if parts.unknown else "about"
        needs = f"the run would need {about} {_gb(parts.peak)}, and {_gb(budget)} are available"
        if best is not None and self.parts(best).unknown:
            return f"{needs}; {batch_overrides(best)} needs less, by how much is not predicted"
        if best is not None:
            hint = ", topology.batch=auto picks it by itself" if self.best(budget) is not None else ""
            return f"{needs}; {batch_overrides(best)} would fit ({_gb(self.parts(best).peak)}){hint}"
        longest = self.longest_that_fits(budget)
        if longest is not None:
            return (
                f"{needs}, and no micro-batch fits; dataset.max_seq_length={longest} with training.micro_batch_size=1 "
                "training.recompute=blocks would"
            )
        if self.adapter.type == "full":
            return f"{needs}, and no batch fits; adapter=lora needs far less"
        weights, execution = parts.weights, self.execution
        in_4_bits = self.shape.weight_bytes(WeightFormat(execution.dtype, 4))
        if execution.device != "cpu" and execution.bits is None and in_4_bits < 0.8 * budget:
            return f"{needs}: the weights alone are {_gb(weights)}; model.quantization=4bit would make them fit"
        return (
            f"{needs}: the weights alone are {_gb(weights)}; topology.placement=stream reads them from disk "
            "when they are needed"
        )


def batch_overrides(execution: Execution) -> str:
    """The words of a command line that ask for the batch settings of ``execution``."""
    words = [f"training.micro_batch_size={execution.micro_batch_size or 'null'}"]
    words += [f"training.recompute={execution.recompute}"] if execution.recompute != "none" else []
    words += [f"training.loss_chunk={execution.loss_chunk}"] if execution.loss_chunk else []
    return " ".join(words)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
