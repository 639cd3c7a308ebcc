"""How many kernels a graph hands to a GPU: counted in the graph that ``mx.compile`` has made, on any machine.

Views are not counted. What MLX computes in several kernels, as concatenation does, counts as often. Whether an
operation copies an input of another layout is not known from a graph, but for one case: a transposed array whose
dimensions are merged is copied. A sum counts once, though a long one takes two kernels, and a matrix product too.

A CPU has no kernels for norms, rotary embeddings and attention; there MLX puts the operations in the graph that they
consist of. :func:`like_a_gpu` puts one operation in place of each, with the gradients that a GPU has. What such a graph
computes is of no use.
"""

from __future__ import annotations

import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx

VIEWS = {
    *("AsStrided", "Broadcast", "BroadcastAxes", "Copy", "CustomTransforms", "Depends", "ExpandDims", "Flatten"),
    *("NumberOfElements", "Reshape", "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View"),
}
_MERGES = {"Flatten", "Reshape"}
_ONE_KERNEL, _TWO_KERNELS = "CumSum", "Sort"
"""Operations that no model has: what :func:`like_a_gpu` puts in place of others."""


def launches(*arrays: mx.array) -> Counter[str]:
    """Kernels that compute ``arrays``, which have not been computed yet, by the kind of operation."""
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    kinds: dict[str, str] = {}
    inputs: dict[str, list[str]] = defaultdict(list)
    made_by: dict[str, str] = {}
    outputs: dict[str, list[str]] = defaultdict(list)
    for line in text.getvalue().splitlines():
        if label := re.match(r'\{ (\d+) \[label ="(\w+)', line):
            kinds[label[1]] = label[2]
        elif edge := re.match(r'"(\w+)" -> (\d+)', line):
            inputs[edge[2]].append(edge[1])
        elif edge := re.match(r'(\d+) -> "(\w+)"', line):
            made_by[edge[2]] = edge[1]
            outputs[edge[1]].append(edge[2])

    def is_transposed(array: str) -> bool:
        maker = made_by.get(array)
        if maker is None or kinds[maker] not in VIEWS:
            return False
        # Of what it is a view: these two have several outputs, and the others one input.
        place = outputs[maker].index(array) if kinds[maker] in ("CustomTransforms", "Depends") else 0
        if kinds[maker] == "CustomTransforms":  # its last inputs are its outputs
            place -= len(outputs[maker])
        return kinds[maker] == "Transpose" or (kinds[maker] not in _MERGES and is_transposed(inputs[maker][place]))

    count: Counter[str] = Counter()
    for node, kind in kinds.items():
        if kind in _MERGES and is_transposed(inputs[node][0]):
            count["copy"] += 1
        elif kind == "Concatenate":
            count[kind] += len(inputs[node])
        elif kind == _TWO_KERNELS:
            count["gradient of a norm"] += 2
        elif kind == _ONE_KERNEL:
            count["norm, rotary embedding, fused attention"] += 1
        elif kind not in VIEWS:
            count["Compiled" if kind.startswith("Compiled") else kind] += 1
    return count


@contextmanager
def like_a_gpu(kind: str) -> Iterator[None]:
    """Inside, graphs made on a CPU have the operations that those made on a ``kind`` ("metal" or "cuda") have.

    On CUDA, attention is fused where MLX has a kernel for it (16 bits, heads of 128 at most); its gradient where the
    queries are a multiple of 128, else it is that of plain operations. On Metal attention is not fused in training.
    """
    if mx.default_device() != mx.cpu:
        yield
        return
    plain = mx.fast.scaled_dot_product_attention
    before = {name: getattr(mx.fast, name) for name in ("rms_norm", "rope", "scaled_dot_product_attention")}
    instead: dict[str, Any] = {"rms_norm": _norm, "rope": _rope}
    if kind == "cuda":
        instead["scaled_dot_product_attention"] = partial(_attention, plain)
    try:
        for name, function in instead.items():
            setattr(mx.fast, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(mx.fast, name, function)


def _one_kernel(*arrays: mx.array) -> mx.array:
    """What one kernel makes of ``arrays``, of the form of the first."""
    first, *others = arrays
    return mx.cumsum(mx.depends([first], others)[0] if others else first, axis=-1)


def _norm(x: mx.array, weight: mx.array | None, _eps: float, **_named: Any) -> Any:
    """``mx.fast.rms_norm``, whose gradient takes a second kernel where there is a weight, trained or not."""
    if weight is None:
        norm = mx.custom_function(lambda x: _one_kernel(x))
        norm.vjp(lambda x, grad, _output: _one_kernel(grad, x))
        return norm(x)
    weighted = mx.custom_function(lambda x, _weight: _one_kernel(x))

    @weighted.vjp
    def _vjp(inputs: Any, grad: mx.array, _output: mx.array) -> tuple[mx.array, mx.array]:
        grad_x = mx.sort(mx.depends([grad], [inputs[0]])[0], axis=-1)
        return grad_x, mx.depends([inputs[1]], [grad_x])[0]

    return weighted(x, weight)


def _rope(x: mx.array, *_arguments: Any, **_named: Any) -> Any:
    rope = mx.custom_function(lambda x: _one_kernel(x))
    rope.vjp(lambda _x, grad, _output: _one_kernel(grad))
    return rope(x)


def _attention(
    plain: Any, q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **named: Any
) -> Any:
    is_fused = q.dtype in (mx.bfloat16, mx.float16) and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0
    if not is_fused:
        return plain(q, k, v, scale=scale, mask=mask, **named)
    masks = [mask] if isinstance(mask, mx.array) else []
    if masks and mask.dtype == mx.bool_:  # cuDNN adds masks
        masks = [mx.where(mask, mx.zeros(q.shape[:-1] + k.shape[2:3], q.dtype), -mx.inf)]

    def forward(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return _one_kernel(q, k, v, *masks)

    fused = mx.custom_function(forward)

    @fused.vjp
    def _vjp(inputs: Sequence[mx.array], grad: mx.array, output: mx.array) -> Any:
        if q.shape[2] % 128:
            return mx.vjp(lambda *each: plain(*each, scale=scale, mask=mask, **named), list(inputs), [grad])[1]
        grad_q = _one_kernel(grad, output, *inputs, *masks)
        return grad_q, *mx.depends(list(inputs[1:]), [grad_q])

    return fused(q, k, v)
