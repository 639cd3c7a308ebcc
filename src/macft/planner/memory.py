"""Peak memory of a training run, predicted from sizes alone.

The peak is ``mx.get_peak_memory()``: what MLX holds at once, without the Python process (about 0.3 GB) and without
NumPy arrays (two flat float32 gradients). What blocks of the Llama kind hold is in :mod:`macft.planner.block_memory`.

The CPU's kernels compute layer by layer (:mod:`macft.model.backends.cpu.eager`) and hold other arrays. Their formula is
fitted to gradients of 104 random models, within 17%. With checkpointed blocks it is rough, and a fifth is added.

Other blocks (mixtures, latent attention, windows, wrappers of such) have no formula: what they take is counted in the
graph of their own code (:mod:`macft.planner.trace`). Where that can't show it, the prediction says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from macft.model.adapters.layers import chosen_layers, select_layers
from macft.model.adapters.settings import AdapterConfig
from macft.model.execution import Execution
from macft.model.packing import attention_size
from macft.model.shape import ModelShape
from macft.planner.block_memory import block_memory, scores_at_once
from macft.planner.trace import Traced, traced
from macft.training.optimizer_table import OPTIMIZERS

# Bytes per logit while the loss is computed. In chunks several are under way, with a float32 copy where the logits are
# of 16 bits.
_BYTES_PER_LOGIT, _BYTES_PER_CHUNKED_LOGIT = {2: 9.0, 4: 16.0}, {2: 21.0, 4: 32.0}
_VALIDATION_BYTES_PER_LOGIT, _VALIDATION_BYTES_PER_CHUNKED_LOGIT = 13.8, 44.0
# In validation, values for each token (factors of hidden and feed-forward size) and for each score.
_VALIDATION_OF_BLOCK, _VALIDATION_SCORES = (2.4, 3.65), 2.0
# Layer by layer: floats per token that each block saves (factors of hidden, queries, keys, feed-forward), transient
# ones (factors of hidden, feed-forward), floats per logit and per trained parameter. With checkpointed blocks the saved
# ones are a factor of hidden alone, and the transient ones factors of hidden, queries and feed-forward.
_EAGER_SAVED, _EAGER_TRANSIENT, _EAGER_LOGIT, _EAGER_TRAINED = (5.7, 4.9, 2.2, 5.2), (9.46, 4.65), 5.0, 2.0
_EAGER_VALIDATION_LOGIT = 3.2
# Where the loss goes through the vocabulary in blocks: floats per target and hidden size, and no logits.
_EAGER_TARGET = 4.0
_RECOMPUTED_SAVED, _RECOMPUTED_TRANSIENT, _RECOMPUTED = 0.46, (15.65, 13.29, 7.86), 1.2
# Before the first step the model is tried with few tokens (head apart, packs), and the logits are compared.
_TRIAL_TOKENS = 72


@dataclass(frozen=True)
class ComputeShape:
    """What a node computes at once: ``tokens`` of ``rows`` that have up to ``length`` each, and ``targets`` of them.

    See DeviceBatchShape: these may be the sums of several ``parts``. ``accumulated``: there is more of it in a step.
    ``validation``: how many times as much validation computes at once, 0 where there is none.
    """

    rows: int
    length: int
    tokens: int
    targets: int
    parts: int = 1
    accumulated: bool = False
    validation: float = 0.0


@dataclass(frozen=True)
class MemoryParts:
    """Bytes of each part at the peak of a step; ``other_peak`` is the highest of loading, validation and update."""

    weights: float
    adapter: float
    optimizer: float
    gradients: float
    activations: float
    logits: float
    other_peak: float
    # Why the activations aren't known, where they aren't: they and the logits are then 0, and the peak is a least one.
    unknown: str | None = None

    @property
    def step(self) -> float:
        """The peak of a training step."""
        resident = self.weights + self.adapter + self.optimizer + self.gradients
        return resident + self.activations + self.logits

    @property
    def overhead(self) -> float:
        """What loading, validation or the update need beyond a step's peak."""
        return max(0.0, self.other_peak - self.step)

    @property
    def peak(self) -> float:
        """The peak of the whole run."""
        return max(self.step, self.other_peak)


@dataclass(frozen=True)
class Trained:
    """What of the model is trained: ``parameters`` and, of the blocks a gradient passes through, their number."""

    parameters: int
    depth: int
    projections: frozenset[str]


def trained_part(shape: ModelShape, adapter: AdapterConfig) -> Trained:
    """Counts what :func:`macft.model.adapters.adapt.adapt` would make trainable.

    Raises:
        ConfigError: a block number or projection the model doesn't have.
    """
    blocks, projections = select_layers(adapter, shape.adaptable)
    parameters = 0
    for number in blocks:
        block = shape.adaptable[number]
        if adapter.type == "full" and not adapter.targets:
            parameters += block.parameters
            continue
        for layer in chosen_layers(block, projections):
            parameters += layer.trained_parameters(adapter.type, adapter.rank)
    names = frozenset(name.rsplit(".", 1)[-1] for name in projections)
    return Trained(parameters, shape.blocks - min(blocks, default=shape.blocks), names)


def predict(
    shape: ModelShape,
    execution: Execution,
    adapter: AdapterConfig,
    optimizer: str,
    work: ComputeShape,
    *,
    by_block: bool = False,
) -> MemoryParts:
    """Peak memory of a run on one node that computes ``work`` as ``execution`` says, by part, in bytes.

    ``by_block``: while it loads, the node reads what is around the blocks only.
    """
    if shape.odd_block is not None:
        return _predict_from_graph(shape, execution, adapter, optimizer, work, by_block=by_block)
    trained = trained_part(shape, adapter)
    width = execution.weight_format.float_bytes
    weights = shape.weight_bytes(execution.weight_format)
    full = adapter.type == "full"
    parameter_bytes = width if full else 4
    adapter_bytes = 0.0 if full else 4.0 * trained.parameters
    optimizer_bytes = OPTIMIZERS[optimizer].states * parameter_bytes * trained.parameters
    grad_bytes = 4.0 * trained.parameters * (1.3 if work.accumulated else 0.2)
    logits = _logits(shape, execution, work)
    if execution.kernels == "cpu":
        at_once = min(work.targets, work.parts * execution.loss_chunk_for(shape.vocabulary))
        activations, logits, grad_bytes = _layer_by_layer(shape, execution, trained, work, at_once)
    else:
        block = block_memory(
            shape, execution, trained.projections, rows=work.rows, length=work.length, tokens=work.tokens
        )
        kept = block.kept
        if adapter.type == "dora" and execution.recompute == "none":
            kept += width * work.tokens * _kept_by_dora(shape, trained)
        activations = trained.depth * kept + block.inside
        logits = max(0.0, logits - block.inside)
    resident = weights + adapter_bytes + optimizer_bytes
    return MemoryParts(
        weights=weights,
        adapter=adapter_bytes,
        optimizer=optimizer_bytes,
        gradients=grad_bytes,
        activations=activations,
        logits=logits,
        other_peak=max(
            _loading(shape, execution, weights, by_block=by_block),
            weights + adapter_bytes + 4 * _TRIAL_TOKENS * shape.vocabulary,
            resident + _validation(shape, execution, work),
            # New parameters and states beside the old ones, and the gradient.
            resident + parameter_bytes * trained.parameters * 1.4,
        ),
    )


def recomputed_inputs(shape: ModelShape, execution: Execution, depth: int, tokens: int) -> float:
    """Bytes of the inputs of ``depth`` recomputed blocks, of ``tokens`` tokens, as :func:`predict` counts them."""
    if execution.kernels == "cpu":
        return 4 * _RECOMPUTED * _RECOMPUTED_SAVED * shape.hidden * depth * tokens
    return float(depth * tokens * shape.hidden * execution.weight_format.float_bytes)


def _logits(shape: ModelShape, execution: Execution, work: ComputeShape) -> float:
    """Bytes that the loss holds at once, with MLX's operations."""
    chunk = work.parts * execution.loss_chunk_for(shape.vocabulary)
    width = execution.weight_format.float_bytes
    return min(_BYTES_PER_LOGIT[width] * work.targets, _BYTES_PER_CHUNKED_LOGIT[width] * chunk) * shape.vocabulary


def _predict_from_graph(
    shape: ModelShape,
    execution: Execution,
    adapter: AdapterConfig,
    optimizer: str,
    work: ComputeShape,
    *,
    by_block: bool,
) -> MemoryParts:
    """For blocks that no formula here is for: from the graph of the model's own code, where that shows it."""
    trained = trained_part(shape, adapter)
    parameter_bytes = execution.weight_format.float_bytes if adapter.type == "full" else 4
    weights = shape.weight_bytes(execution.weight_format)
    adapter_bytes = 0.0 if adapter.type == "full" else 4.0 * trained.parameters
    optimizer_bytes = OPTIMIZERS[optimizer].states * parameter_bytes * trained.parameters
    resident = weights + adapter_bytes + optimizer_bytes
    # Tokens of a pack are laid out as rows to attend, and are fewer elsewhere.
    rows = max(1, -(-work.tokens // work.length))
    found = traced(
        shape.config,
        execution,
        adapter,
        rows,
        work.length,
        logits=_logits(shape, execution, work),
        validation_logits=_validation_logits(shape, execution, replace(work, validation=1.0)),
    )
    known = found if isinstance(found, Traced) else Traced(0.0, 0.0)
    return MemoryParts(
        weights=weights,
        adapter=adapter_bytes,
        optimizer=optimizer_bytes,
        # The graph's own gradient is among its activations.
        gradients=4.0 * trained.parameters * (work.accumulated or known is not found),
        activations=known.step,
        logits=0.0,
        other_peak=max(
            _loading(shape, execution, weights, by_block=by_block),
            resident + work.validation * known.validation,
            resident + parameter_bytes * trained.parameters * 1.4,
        ),
        unknown=None if found is known else f"activations of {shape.odd_block} are not predicted: {found}",
    )


def _layer_by_layer(
    shape: ModelShape, execution: Execution, trained: Trained, work: ComputeShape, logits: int
) -> tuple[float, float, float]:
    """Bytes of activations, logits and gradients where the CPU's kernels compute."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    again = execution.recompute == "blocks" and trained.depth > 0
    if again:
        saved: float = _RECOMPUTED_SAVED * shape.hidden
        transient = _dot(_RECOMPUTED_TRANSIENT, (shape.hidden, query, shape.intermediate))
        # A block's peak is short: those of parts computed at the same time coincide about half the time.
        transient *= (1 + 1 / work.parts) / 2
    else:
        saved = _dot(_EAGER_SAVED, (shape.hidden, query, key, shape.intermediate))
        transient = _dot(_EAGER_TRANSIENT, (shape.hidden, shape.intermediate))
    margin = _RECOMPUTED if again else 1.0
    return (
        4 * margin * work.tokens * (trained.depth * saved + transient),
        _eager_loss(shape, work.targets, logits, _EAGER_LOGIT),
        # Parts that have ended hold their gradient, while the last one computes.
        4 * trained.parameters * (_EAGER_TRAINED + work.parts - 1 + work.accumulated),
    )


def _eager_loss(shape: ModelShape, targets: int, at_once: int, floats_per_logit: float) -> float:
    """Bytes that the loss of ``targets`` takes; a head that isn't plain has logits, of ``at_once`` of them."""
    if shape.plain_head:
        return 4 * _EAGER_TARGET * targets * shape.hidden
    return 4 * floats_per_logit * at_once * shape.vocabulary


def _dot(factors: Sequence[float], sizes: Sequence[int]) -> float:
    return sum(factor * size for factor, size in zip(factors, sizes, strict=True))


def _kept_by_dora(shape: ModelShape, trained: Trained) -> int:
    """Values for each token that a block keeps for the gradient of DoRA's magnitudes: what they are multiplied by."""
    return sum(linear.outputs for linear in shape.linears if linear.name.rsplit(".", 1)[-1] in trained.projections)


def _validation(shape: ModelShape, execution: Execution, work: ComputeShape) -> float:
    if execution.kernels == "cpu":
        logits = _eager_loss(shape, work.targets, work.targets, _EAGER_VALIDATION_LOGIT)
        transient = 0.6 * 4 * work.tokens * _dot(_EAGER_TRANSIENT, (shape.hidden, shape.intermediate))
        return work.validation * max(logits, transient)
    width, hidden, intermediate = execution.weight_format.float_bytes, *_VALIDATION_OF_BLOCK
    logits = _validation_logits(shape, execution, work)
    block = work.validation * width * work.tokens * (hidden * shape.hidden + intermediate * shape.intermediate)
    # A GPU's attention is fused where there is no gradient.
    attention = attention_size(work.tokens, work.rows, work.length, shape.head_dim)
    scores = scores_at_once(shape, attention, execution.max_evaluation_scores) if execution.device == "cpu" else 0
    return max(logits, block + _VALIDATION_SCORES * width * scores * bool(work.validation))


def _validation_logits(shape: ModelShape, execution: Execution, work: ComputeShape) -> float:
    """Bytes that the loss holds at once in validation, with MLX's operations."""
    targets = work.validation * work.targets
    chunk = execution.loss_chunk_for(shape.vocabulary)
    sizes = _VALIDATION_BYTES_PER_LOGIT * targets, _VALIDATION_BYTES_PER_CHUNKED_LOGIT * chunk
    return shape.vocabulary * (sizes[0] if targets <= chunk else min(sizes))


def _loading(shape: ModelShape, execution: Execution, weights: float, *, by_block: bool) -> float:
    """Peak while loading: a checkpoint in another form stays until the new weights are made."""
    held, stored = execution.weight_format, shape.checkpoint
    same = held.bits == stored.bits and (stored.bits is not None or held.float_bytes == stored.float_bytes)
    read = shape.outside_bytes(stored) if by_block else shape.weight_bytes(stored)
    return weights if same else weights + read
