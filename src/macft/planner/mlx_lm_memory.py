"""Peak memory of ``mlx_lm.lora`` with the same model and rows, to set macft's beside it (mlx-lm 0.32).

By counts as those of :mod:`macft.planner.block_memory`. What differs: LoRA's inputs are held as float32 copies, of the
gate its sigmoid and the product with that too, and a mask for each block; scores exist as a whole, the optimizer is
Adam, and the loss holds the logits of all positions. ``--grad-checkpoint`` holds each block's input instead.
"""

from __future__ import annotations

from macft.model.adapter_settings import AdapterConfig
from macft.model.execution import Execution
from macft.model.packing import attention_size
from macft.model.shape import ModelShape
from macft.planner.block_memory import Factors, adapter_inputs
from macft.planner.memory import trained_part

# Measured on MLX's CPU backend. Arrays of the size of all logits, in their type: the logits, their softmax, the
# gradient and its parts. Values for each token inside of blocks, as a multiple of the feed-forward size: the gradients
# of 20 matrices are computed last, so that what they need of more than a block is held, in float32.
_ARRAYS_OF_LOGITS = 6.5
_INSIDE = {2: 40.0, 4: 22.0}
# Where a block is computed again: beside what it then holds, in its feed-forward part and in attention.
_INSIDE_AGAIN = Factors(4.1, 5.9, 0, 0, 0.3), Factors(3, -5, 3, 3, 2.15)
_ADAM_STATES = 2


def predict_mlx_lm(
    shape: ModelShape,
    execution: Execution,
    adapter: AdapterConfig,
    length: int,
    *,
    rows: int = 1,
    is_checkpointed: bool = False,
) -> float:
    """Bytes at the peak of a step of ``rows`` of ``length`` tokens; ``shape`` must have no odd block.

    Of ``execution`` the form of the weights and the device count. ``is_checkpointed``: with ``--grad-checkpoint``.
    """
    trained = trained_part(shape, adapter)
    width, tokens = execution.weight_format.float_bytes, rows * length
    attention = attention_size(tokens, rows, length, shape.head_dim)
    query, key, scores = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.heads * attention.scores
    values = 2 * shape.hidden + 4 * shape.intermediate + adapter_inputs(shape, trained.projections)
    plain = width * (tokens * values + attention.queries * (query + 2 * key) + scores)
    mask = attention.keys * min(attention.queries, attention.keys)
    kept = plain + mask + tokens * (4 - width) * adapter_inputs(shape, trained.projections)
    again = width * tokens * max(factors.of(shape, scores / tokens) for factors in _INSIDE_AGAIN)
    border = tokens * shape.hidden * width
    logits = _ARRAYS_OF_LOGITS * width * tokens * shape.vocabulary
    held = trained.depth * (border if is_checkpointed else kept)
    inside = max(width * tokens * _INSIDE[width] * shape.intermediate, again + kept if is_checkpointed else 0.0)
    # Adapter, gradient and the optimizer's states, in float32.
    state = 4.0 * (2 + _ADAM_STATES) * trained.parameters
    return shape.weight_bytes(execution.weight_format) + state + held + max(inside, logits)
