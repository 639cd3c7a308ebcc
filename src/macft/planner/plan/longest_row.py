"""The longest row that can be trained in the memory of a node, and the longest that mlx_lm.lora could train there."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from macft.config.execution import execution_for
from macft.config.schema import TrainConfig
from macft.data.batch import PAD_TO, coarse_length
from macft.device.chips import find_macs
from macft.device.kind import METAL, Device
from macft.device.memory import usable_bytes
from macft.model.execution import Execution, recomputations
from macft.model.shape import ModelShape
from macft.planner.known_models import find_shape
from macft.planner.memory import ComputeShape, MemoryParts, predict, trained_part
from macft.planner.mlx_lm_memory import predict_mlx_lm
from macft.planner.plan.expected_steps import Progress
from macft.topology.settings import parse_budget

_STEP = 32
# Rows of more tokens than a model was made for are not looked at, nor more than this.
_LONGEST = 131072


@dataclass(frozen=True)
class LongestRow:
    """The tokens of the longest row that fits ``budget`` bytes on a node, by what is recomputed; 0 where none fits."""

    node: str
    budget: float
    macft: dict[str, int]
    mlx_lm: dict[str, int]


@dataclass(frozen=True)
class LongestRowPlan:
    """Of each node; ``limit``: rows of more tokens were not looked at. ``unknown``: why nothing can be said."""

    model: str
    trainable: int
    nodes: list[LongestRow]
    limit: int
    notes: list[str] = field(default_factory=list)
    unknown: str | None = None


def find_longest_rows(config: TrainConfig, *, progress: Progress | None = None) -> LongestRowPlan:
    """For ``plan.chips``, or this machine, with the model and the adapter of ``config``, one row at a time.

    A row is all targets. Validation takes one row at a time too. No dataset is read.

    Raises:
        ModelError: nothing is known of the model's shape.
        ConfigError: the device doesn't support a setting.
    """
    notes: list[str] = []
    (progress or (lambda *_: None))(f"finding the model {config.model.path}", 0, 0)
    shape, _ = find_shape(config, notes)
    macs = find_macs(config.plan.chips)
    execution = execution_for(config, shape, shape.checkpoint, METAL if macs else Device.default()).padded()
    execution = replace(execution, lanes=1)
    names = list(dict.fromkeys(mac.name for mac in macs)) if macs else ["this machine"]
    budgets = {mac.name: mac.usable_bytes for mac in macs} if macs else {names[0]: usable_bytes()}
    limit = min(_LONGEST, int(shape.config.get("max_position_embeddings") or _LONGEST))
    plan = LongestRowPlan(config.model.path, trained_part(shape, config.adapter).parameters, [], limit, notes)
    parts = _parts(config, shape, execution, _STEP)
    if parts.unknown:
        return replace(plan, unknown=parts.unknown)
    for name in names:
        budget = parse_budget(config.topology.memory_budget, budgets[name])
        plan.nodes.append(_longest(config, shape, execution, name, budget, limit))
    return plan


def _longest(
    config: TrainConfig, shape: ModelShape, execution: Execution, name: str, budget: float, limit: int
) -> LongestRow:
    def with_macft(recompute: str) -> Callable[[int], bool]:
        way = execution.with_batch(1, recompute)
        return lambda length: _parts(config, shape, way, length).peak <= budget

    def with_mlx_lm(checkpointed: bool) -> Callable[[int], bool]:
        return lambda length: (
            predict_mlx_lm(shape, execution, config.adapter, length, is_checkpointed=checkpointed) <= budget
        )

    lengths = range(_STEP, limit + 1, _STEP)
    # Rows are padded to a few lengths where a step is compiled.
    few = sorted({min(limit, coarse_length(length) - 1) for length in lengths}) if execution.compiled else lengths
    return LongestRow(
        name,
        budget,
        {way: _most(few, with_macft(way)) for way in recomputations(execution.kernels)},
        {"none": _most(lengths, with_mlx_lm(False)), "blocks": _most(lengths, with_mlx_lm(True))},
    )


def _most(lengths: Sequence[int], fits: Callable[[int], bool]) -> int:
    """The largest of ``lengths`` that ``fits``, 0 if none does; what fits fits shorter rows too."""
    count = bisect_right(lengths, False, key=lambda length: not fits(length))
    return lengths[count - 1] if count else 0


def _parts(config: TrainConfig, shape: ModelShape, execution: Execution, length: int) -> MemoryParts:
    """The prediction for rows of ``length`` tokens, one at a time."""
    tokens = -(-length // PAD_TO) * PAD_TO
    training = config.training
    work = ComputeShape(
        1,
        tokens,
        tokens,
        tokens,
        accumulated=training.batch_size > 1,
        validation=float(bool(training.eval_every)),
    )
    return predict(shape, execution, config.adapter, config.optimizer.name, work)
