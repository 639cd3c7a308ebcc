"""What the choice of a placement needs of a run: the model's costs, the work of a step, how a node computes alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

from macft.config.execution import insists_on_compiling
from macft.config.schema import TrainConfig
from macft.errors import ConfigError
from macft.model.blocks.ends import AFTER, BEFORE, BOTH_ENDS
from macft.model.execution import Execution
from macft.planner.memory import ComputeShape, MemoryParts, predict, trained_part
from macft.planner.memory_planner import MemoryPlanner
from macft.planner.placement.cluster_model import Alone, ModelCost, StepWork
from macft.planner.speed import attention_operations, step_cost
from macft.planner.streamed_memory import UNKNOWN_INSIDE, held_weights, inside_of_block, update_bytes
from macft.planner.whole_model import WeightPlacement, WholeModelPlanner

# The sums of all blocks, and the gradient of one.
_GRADIENTS = 1.2


def can_pipeline(config: TrainConfig) -> bool:
    """Whether a run with these settings can be a pipeline at all."""
    uses_streams = config.collective.backend == "ring" and config.collective.streams
    needs_whole_model = insists_on_compiling(config) or config.adapter.type == "full"
    return uses_streams and config.training.sync != "diloco" and not needs_whole_model


def model_cost(planner: MemoryPlanner) -> ModelCost:
    """The costs of ``planner``'s model; ``planner`` has all rows of the steps, as a single pipeline gets them."""
    shape, execution, adapter = planner.shape, replace(planner.execution, lanes=1), planner.adapter
    trained = trained_part(shape, adapter)
    batches = list(chain.from_iterable(planner.step_batches(1)))
    tokens = max(1, sum(batch.tokens for batch in batches))
    forward_pairs, backward_pairs = attention_operations(planner, execution, batches)
    matrices = [2.0 * active for active in shape.active_parameters]
    low_rank = (2 if adapter.type == "full" else 6) * trained.parameters / max(1, trained.depth)
    first = shape.blocks - trained.depth
    weights = execution.weight_format
    embedding, head, both = (shape.outside_bytes(weights, ends) for ends in ((BEFORE,), (AFTER,), BOTH_ENDS))
    longest = max(planner.works(execution.with_batch(1, "none")), key=lambda work: work.tokens)
    saved, inside, inside_again, logits = _activations(planner, longest)
    resident = predict(shape, replace(execution, recompute="blocks"), adapter, planner.optimizer, longest)
    targets = sum(batch.targets for batch in batches)
    return ModelCost(
        forward=tuple(each + forward_pairs / tokens for each in matrices),
        backward=(0.0,) * first + tuple(each + backward_pairs / tokens + low_rank for each in matrices[first:]),
        block_bytes=shape.block_bytes(weights),
        file_bytes=shape.block_bytes(shape.checkpoint),
        embedding_bytes=embedding,
        head_bytes=head,
        tied_bytes=embedding + head - both,
        hidden=float(shape.hidden * execution.weight_format.float_bytes),
        saved=saved,
        inside=inside,
        inside_again=inside_again,
        loss_operations=4.0 * shape.embedding_parameters * targets / tokens,
        loss_bytes=logits / longest.tokens,
        # Chunks of logits have a size that more tokens don't change.
        loss_most=max(logits, 60.0 * execution.max_logits) if execution.kernels == "mlx" else float("inf"),
        state=resident.adapter + resident.optimizer + 4.0 * _GRADIENTS * trained.parameters,
        update=resident.adapter + resident.optimizer + update_bytes(trained.parameters),
        exchanged=4.0 * trained.parameters,
        first_trained=first,
        trial=held_weights(shape, replace(execution, resident_blocks=())) + resident.adapter,
    )


def step_work(
    planner: MemoryPlanner, micro_batch_size: int | None, shares: tuple[float, ...] | None = None
) -> StepWork:
    """The work of an average step of ``planner``, which has all of its rows; for ``shares`` see StepWork."""
    steps = max(1, len(planner.steps))
    batches = list(chain.from_iterable(planner.step_batches(1)))
    at_once = list(chain.from_iterable(planner.step_batches(micro_batch_size or 1)))
    rows = max(1, round(sum(len(step.lengths) for step in planner.steps) / steps))
    return StepWork(
        tokens=sum(batch.tokens for batch in batches) / steps,
        rows=rows,
        longest=float(max((batch.tokens for batch in at_once), default=1)),
        micro_batches=-(-rows // micro_batch_size) if micro_batch_size else None,
        recompute="auto" if planner.execution.may_keep_activations else "always",
        shares=shares,
    )


def alone(whole_model: WholeModelPlanner, execution: Execution, *, speed: float, disk: float) -> Alone:
    """How the node of ``whole_model`` computes with the whole model, as ``execution`` says.

    ``whole_model`` has the rows that the node would get; ``speed`` in operations a second, ``disk`` in bytes a second.
    """
    planner = whole_model.planner
    steps = max(1, len(planner.steps))
    tokens = sum(batch.tokens for batch in chain.from_iterable(planner.step_batches(1))) / steps
    seconds = step_cost(planner, execution).operations / speed
    read = WeightPlacement.of(planner.shape, execution, whole_model.first_trained).read_bytes
    return Alone(seconds / max(1.0, tokens), read / disk, execution.placement == "stream")


def _activations(planner: MemoryPlanner, work: ComputeShape) -> tuple[float, float, float, float]:
    """Bytes a token: saved by a block, inside a block, inside one that is recomputed; and bytes of the logits.

    They are the differences between predictions with the last block and the last two blocks trained.
    """
    shape, execution = planner.shape, replace(planner.execution, lanes=1)
    border = float(shape.hidden * execution.weight_format.float_bytes)

    def parts(depth: int) -> MemoryParts:
        last = list(range(shape.blocks))[-depth:]
        adapter = replace(planner.adapter, layers=last, num_layers=-1)
        return predict(shape, replace(execution, recompute="none"), adapter, planner.optimizer, work)

    again = inside_of_block(shape, execution, planner.adapter, planner.optimizer, work).size / work.tokens
    guess = UNKNOWN_INSIDE * border
    try:
        one, two = parts(1), parts(2)
    except ConfigError:  # the last blocks have none of the layers that are trained
        return guess, guess, again, 0.0
    if one.unknown or two.unknown:
        return guess, guess, again, 0.0
    saved = max(border * work.tokens, two.activations - one.activations)
    inside = max(0.0, one.activations - saved)
    return saved / work.tokens, inside / work.tokens, again, one.logits
