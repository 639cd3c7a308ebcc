"""Memory of a step whose blocks are recomputed by MLX's operations (:mod:`macft.model.backends.mlx.recompute`).

What a block keeps was counted in its code and is exact: with ``cheap`` its input and the results of matrix products and
attention, with ``blocks`` its input. What exists inside the one block whose backward pass is computed was fitted to
gradients of 36 random models on MLX's CPU backend, in float32 and bfloat16: within 19% of the step's memory, 6 to 7% in
the mean (root of squares); see docs/plan.md. Attention goes through blocks of queries, so that its scores have a limit.
"""

from __future__ import annotations

from typing import NamedTuple

from macft.model.execution import Execution
from macft.model.packing import attention_size
from macft.model.shape import ModelShape

# Inside a block: values for each token (factors of hidden size, feed-forward size, queries and keys), and for each
# score that exists at once.
_INSIDE = {"cheap": (1.0, 5.2, 8.2, 3.1), "blocks": (4.0, 13.0, 8.7, 3.2)}
_FEWEST_QUERIES = 32


class Recomputed(NamedTuple):
    """Bytes: ``kept`` by each block until its backward pass, and ``inside`` the one that is computed."""

    kept: float
    inside: float


def recomputed_block(shape: ModelShape, execution: Execution, *, rows: int, length: int, tokens: int) -> Recomputed:
    """Of ``tokens`` tokens that attend as ``rows`` of up to ``length``."""
    width = execution.weight_format.float_bytes
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    kept = shape.hidden
    if execution.recompute == "cheap":
        kept += shape.hidden + 2 * query + 2 * key + 2 * shape.intermediate
    hidden, intermediate, attention, scores = _INSIDE[execution.recompute]
    values = hidden * shape.hidden + intermediate * shape.intermediate + attention * (query + key)
    size = attention_size(tokens, rows, length, shape.head_dim)
    at_once = min(shape.heads * size.scores, max(execution.max_scores, shape.heads * size.queries * _FEWEST_QUERIES))
    return Recomputed(float(tokens * kept * width), width * (tokens * values + scores * at_once))
