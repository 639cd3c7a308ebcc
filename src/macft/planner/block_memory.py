"""What a block of the Llama kind holds while MLX's operations train it: what it keeps for its backward pass, and more
while that is computed.

What it keeps was counted in the graphs of mlx-lm's code and of :mod:`macft.model.backends.mlx.recompute`. What exists
besides was counted in gradients of models in which one size is much larger than the others, so that each factor shows:
MLX hands over operations in advance, so that most arrays that a layer's backward pass makes exist at once. The peak is
in the feed-forward part or in attention, whichever takes more; see docs/plan.md.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

from macft.model.execution import Execution
from macft.model.packing import FEWEST_QUERIES, AttentionSize, attention_size, is_cheap_attention
from macft.model.shape import ModelShape

_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


class BlockMemory(NamedTuple):
    """Bytes: ``kept`` by each block until its backward pass, and ``inside`` the one that is computed."""

    kept: float
    inside: float


class Factors(NamedTuple):
    """Values for each token, as multiples of hidden size, feed-forward size, queries, keys, and scores of a token."""

    hidden: float
    intermediate: float
    query: float
    key: float
    scores: float

    def of(self, shape: ModelShape, scores: float) -> float:
        """Values for each token, with so many ``scores`` of all heads."""
        query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        sizes = (shape.hidden, shape.intermediate, query, key, scores)
        return sum(factor * size for factor, size in zip(self, sizes, strict=True))


# In the feed-forward part, and in attention. Without recomputation the block that is computed has its own values among
# the kept ones, and has freed those of its feed-forward part when it comes to attention.
_INSIDE = {
    "none": (Factors(13.3, 5.6, 0, 0, 0.2), Factors(3, -3, 3, 3, 3.2)),
    "cheap": (Factors(5.5, 9.05, 0, 0, 0.1), Factors(1.7, 0, 3, 3, 4.8)),
    "blocks": (Factors(15, 8.95, 0, 0, 1.0), Factors(5, 4, 4, 4, 4.8)),
}


def block_memory(
    shape: ModelShape,
    execution: Execution,
    projections: Collection[str],
    *,
    rows: int,
    length: int,
    tokens: int,
) -> BlockMemory:
    """Of ``tokens`` tokens that attend as ``rows`` of up to ``length``; ``projections`` have adapters."""
    attention = attention_size(tokens, rows, length, shape.head_dim)
    most = execution.max_scores if execution.recompute != "none" else None
    feed_forward, attending = _INSIDE[execution.recompute]
    # Beside the feed-forward part the first block of queries is under way.
    first = min(shape.heads * attention.scores, most or math.inf)
    inside = max(
        feed_forward.of(shape, first / tokens),
        attending.of(shape, scores_at_once(shape, attention, most) / tokens),
    )
    width = execution.weight_format.float_bytes
    kept = _kept(shape, execution, projections, attention, tokens)
    return BlockMemory(kept, width * tokens * inside)


def scores_at_once(shape: ModelShape, attention: AttentionSize, most: int | None) -> int:
    """Scores of all heads that exist at once, where a block of queries has ``most``; None: all of them do.

    Those of two blocks do, as MLX hands over one while it computes the other. A block has 32 queries at least.
    """
    scores = shape.heads * attention.scores
    return scores if most is None else min(scores, 2 * max(most, shape.heads * attention.queries * FEWEST_QUERIES))


def _kept(
    shape: ModelShape, execution: Execution, projections: Collection[str], attention: AttentionSize, tokens: int
) -> float:
    """Bytes that a block keeps for its backward pass."""
    width = execution.weight_format.float_bytes
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if execution.recompute == "blocks":  # its input
        return float(tokens * shape.hidden * width)
    if execution.recompute == "cheap":  # its input, and the results of matrix products and of costly attention
        attended = 0 if is_cheap_attention(query, attention.keys) else query
        return float(tokens * width * (2 * shape.hidden + query + attended + 2 * key + 2 * shape.intermediate))
    # Inputs of both norms; gate and up; the inputs of adapters.
    values = 2 * shape.hidden + 2 * shape.intermediate + adapter_inputs(shape, projections)
    # Queries, keys and values as they attend, scores, and a mask, of a byte each, that all heads share.
    attending = attention.queries * (query + 2 * key) + shape.heads * attention.scores
    return float(width * (tokens * values + attending) + attention.keys * min(attention.queries, attention.keys))


def adapter_inputs(shape: ModelShape, projections: Collection[str]) -> int:
    """Values for each token in the inputs of layers that have an adapter, each input once."""
    names = set(projections)
    every = not names & _PROJECTIONS
    query = shape.heads * shape.head_dim
    return (
        shape.hidden * (every or bool(names & {"q_proj", "k_proj", "v_proj"}))
        + shape.hidden * (every or bool(names & {"gate_proj", "up_proj"}))
        + query * (every or "o_proj" in names)
        + shape.intermediate * (every or "down_proj" in names)
    )
