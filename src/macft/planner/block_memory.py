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
from dataclasses import dataclass
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


# Blocks of queries whose scores exist at once, for up to so many blocks and for more: measured with 1 to 24 of them.
_FEW_BLOCKS, _FEW_UNDER_WAY, _MANY_UNDER_WAY = 8, 2, 3


_NOTHING = _Factors(0, 0, 0, 0, 0)


@dataclass(frozen=True)
class StepKind:
    """How a step holds blocks: what is inside the one that is computed, and what each keeps for its backward pass.

    Inside, in the ``feed_forward`` part and ``attending``. Without recomputation the block that is computed has its own
    values among the kept ones, and has freed those of its feed-forward part when it comes to attention. ``keeps`` is
    for each token, ``keeps_to_attend`` for each query, with the scores of one. ``inputs``: how often the inputs of
    adapters are kept; ``attended``: attention's result, where it is costly; ``mask``: the mask of a block, of a byte
    for each query and key, that all heads share. ``in_blocks``: attention goes through blocks of queries.
    """

    feed_forward: _Factors
    attending: _Factors
    keeps: _Factors
    keeps_to_attend: _Factors = _NOTHING
    inputs: int = 0
    attended: int = 0
    mask: int = 0
    in_blocks: bool = False


# Queries, keys and values, and scores.
_TO_ATTEND = _Factors(0, 0, 1, 2, 1)
STEPS = {
    # Inputs of both norms; gate and up, of the gate also its sigmoid and the product with that.
    "mlx_lm": StepKind(
        feed_forward=_Factors(4.1, 5.9, 0, 0, 0.3),
        attending=_Factors(3, -5, 3, 3, 2.15),
        keeps=_Factors(2, 4, 0, 0, 0),
        keeps_to_attend=_TO_ATTEND,
        inputs=1,
        mask=1,
    ),
    "none": StepKind(
        feed_forward=_Factors(4.1, 5.2, 0, 0, 0.3),
        attending=_Factors(5, -3, 7, 7, 2.15),
        keeps=_Factors(2, 2, 0, 0, 0),
        keeps_to_attend=_TO_ATTEND,
        inputs=1,
    ),
    # Its input, and the results of matrix products.
    "cheap": StepKind(
        feed_forward=_Factors(5, 6.5, 0, 0, 0.8),
        attending=_Factors(4, 0, 7, 7, 3.15),
        keeps=_Factors(2, 2, 1, 2, 0),
        attended=1,
        in_blocks=True,
    ),
    # Its input.
    "blocks": StepKind(
        feed_forward=_Factors(5.5, 9.5, 0, 0, 1.2),
        attending=_Factors(7, 0, 8, 8, 3.15),
        keeps=_Factors(1, 0, 0, 0, 0),
        in_blocks=True,
    ),
}
"""mlx-lm's step, and macft's with each ``training.recompute``."""


def block_memory(
    shape: ModelShape,
    execution: Execution,
    projections: Collection[str],
    *,
    rows: int,
    length: int,
    tokens: int,
    step: str | None = None,
) -> BlockMemory:
    """Of ``tokens`` tokens that attend as ``rows`` of up to ``length``; ``projections`` have adapters.

    ``step``: another of STEPS than ``execution.recompute``.
    """
    kind = STEPS[step or execution.recompute]
    attention = attention_size(tokens, rows, length, shape.head_dim)
    most = execution.max_scores if kind.in_blocks else None
    # Beside the feed-forward part the first block of queries is under way.
    first = min(shape.heads * attention.scores, most or math.inf)
    inside = max(
        kind.feed_forward.of(shape, first / tokens),
        kind.attending.of(shape, scores_at_once(shape, attention, most) / tokens),
    )
    width = execution.weight_format.float_bytes
    return BlockMemory(_kept(kind, shape, projections, attention, tokens, width), width * tokens * inside)


def scores_at_once(shape: ModelShape, attention: AttentionSize, most: int | None) -> int:
    """Scores of all heads that exist at once, where a block of queries has ``most``; None: all of them do.

    Those of the last blocks, which see most keys: MLX hands over one or two while it computes another. Blocks are not
    rounded here as :func:`~macft.model.packing.queries_at_once` does, so that more tokens never seem to need less.
    """
    scores = shape.heads * attention.scores
    if most is None or not scores:
        return scores
    block = max(most, shape.heads * attention.queries * FEWEST_QUERIES)
    count = scores / block
    under_way = _FEW_UNDER_WAY if count <= _FEW_BLOCKS else _MANY_UNDER_WAY
    if not attention.is_causal or count <= 1:
        return int(block * min(count, under_way))
    if count < under_way:  # two: the first sees its own keys only, and the second is what is left
        return int(block * (1 / count + count - 1))
    return int(block * (under_way - under_way * (under_way - 1) / 2 / count))


def _kept(
    kind: StepKind,
    shape: ModelShape,
    projections: Collection[str],
    attention: AttentionSize,
    tokens: int,
    width: int,
) -> float:
    """Bytes that a block keeps for its backward pass."""
    query = shape.heads * shape.head_dim
    values = kind.keeps.of(shape, 0) + kind.inputs * adapter_inputs(shape, projections)
    values += kind.attended * query * (not is_cheap_attention(query, attention.keys))
    to_attend = kind.keeps_to_attend.of(shape, shape.heads * attention.keys)
    mask = attention.keys * min(attention.queries, attention.keys)
    return width * (tokens * values + attention.queries * to_attend) + kind.mask * mask


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
