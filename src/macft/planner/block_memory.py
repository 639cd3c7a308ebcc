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


class _Factors(NamedTuple):
    """Values for each token, as multiples of hidden size, feed-forward size, queries, keys, and scores of a token."""

    hidden: float
    intermediate: float
    query: float
    key: float
    scores: float

    def of(self, shape: ModelShape, scores: float) -> float:
        """Values for each token, with so many ``scores``."""
        query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        sizes = (shape.hidden, shape.intermediate, query, key, scores)
        return sum(factor * size for factor, size in zip(self, sizes, strict=True))


# In the feed-forward part, and in attention. Without recomputation the block that is computed has its own values among
# the kept ones, and has freed those of its feed-forward part when it comes to attention.
_INSIDE = {
    "mlx_lm": (_Factors(4.1, 5.9, 0, 0, 0.3), _Factors(3, -5, 3, 3, 2.15)),
    "none": (_Factors(4.1, 5.2, 0, 0, 0.3), _Factors(5, -3, 7, 7, 2.15)),
    "cheap": (_Factors(5, 6.5, 0, 0, 0.8), _Factors(4, 0, 7, 7, 3.15)),
    "blocks": (_Factors(5.5, 9.5, 0, 0, 1.2), _Factors(7, 0, 8, 8, 3.15)),
}


def block_memory(
    shape: ModelShape,
    execution: Execution,
    projections: Collection[str],
    *,
    rows: int,
    length: int,
    tokens: int,
    of_mlx_lm: bool = False,
) -> BlockMemory:
    """Of ``tokens`` tokens that attend as ``rows`` of up to ``length``; ``projections`` have adapters.

    ``of_mlx_lm``: as mlx-lm's own code computes it, which recomputes nothing.
    """
    attention = attention_size(tokens, rows, length, shape.head_dim)
    most = execution.max_scores if execution.recompute != "none" else None
    feed_forward, attending = _INSIDE["mlx_lm" if of_mlx_lm else execution.recompute]
    # Beside the feed-forward part the first block of queries is under way.
    first = min(shape.heads * attention.scores, most or math.inf)
    inside = max(
        feed_forward.of(shape, first / tokens),
        attending.of(shape, scores_at_once(shape, attention, most) / tokens),
    )
    width = execution.weight_format.float_bytes
    kept = _kept(shape, execution, projections, attention, tokens)
    if of_mlx_lm:  # of the gate its sigmoid and the product with that; the mask, of a byte each, that all heads share
        kept += 2 * width * tokens * shape.intermediate
        kept += attention.keys * min(attention.queries, attention.keys)
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
    # Queries, keys and values as they attend, and scores.
    attending = attention.queries * (query + 2 * key) + shape.heads * attention.scores
    return float(width * (tokens * values + attending))


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
