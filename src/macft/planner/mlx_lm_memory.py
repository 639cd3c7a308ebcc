"""Peak memory of ``mlx_lm.lora`` with the same model and rows, to set macft's beside it (mlx-lm 0.32).

By the same counts as :mod:`macft.planner.block_memory`. What differs there: LoRA's inputs are held as float32 copies,
scores exist as a whole, the optimizer is Adam, and the loss holds the logits of all positions. ``--grad-checkpoint``
holds each block's input instead.
"""

from __future__ import annotations

from macft.model.adapters.settings import AdapterConfig
from macft.model.execution import Execution
from macft.model.shape import ModelShape
from macft.planner.block_memory import adapter_inputs, block_memory
from macft.planner.memory import trained_part

# Measured on MLX's CPU backend. Arrays of the size of all logits, in their type: the logits, their softmax, the
# gradient and its parts. Values for each token inside of blocks, as a multiple of the feed-forward size: the gradients
# of 20 matrices are computed last, so that what they need of more than a block is held, in float32.
_ARRAYS_OF_LOGITS = 6.5
_INSIDE = {2: 40.0, 4: 22.0}
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
    plain = execution.padded().with_batch(rows, "none")
    block = block_memory(shape, plain, trained.projections, rows=rows, length=length, tokens=tokens, step="mlx_lm")
    copies = tokens * (4 - width) * adapter_inputs(shape, trained.projections)
    kept = block.kept + copies
    border = tokens * shape.hidden * width
    logits = _ARRAYS_OF_LOGITS * width * tokens * shape.vocabulary
    held = trained.depth * (border if is_checkpointed else kept)
    inside = max(width * tokens * _INSIDE[width] * shape.intermediate, block.inside + kept * is_checkpointed)
    # Adapter, gradient and the optimizer's states, in float32.
    state = 4.0 * (2 + _ADAM_STATES) * trained.parameters
    return shape.weight_bytes(execution.weight_format) + state + held + max(inside, logits)
