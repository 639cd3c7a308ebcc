"""Results that a recomputed block keeps, so that its backward pass doesn't compute them a second time.

A block's forward pass records them, in the order in which they are computed; when its backward pass computes the block
again, each takes the place of its computation, and has the gradient of that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import mlx.core as mx

from macft.model.backends.operation import after, operation
from macft.model.backends.trees import put_together, take_apart


@dataclass
class Kept:
    """Results in the order in which they were computed: their arrays, and of each its form and number of arrays."""

    arrays: list[mx.array] = field(default_factory=list)
    forms: list[tuple[Any, int]] = field(default_factory=list)


class _Record(threading.local):
    """``made``: where a block's forward pass puts results; ``given``: what its second computation takes them from."""

    made: Kept | None = None
    given: tuple[Iterator[tuple[Any, int]], Iterator[mx.array]] | None = None


_record = _Record()


@contextmanager
def _as(made: Kept | None, given: tuple[Iterator[tuple[Any, int]], Iterator[mx.array]] | None) -> Iterator[None]:
    before = _record.made, _record.given
    _record.made, _record.given = made, given
    try:
        yield
    finally:
        _record.made, _record.given = before


@contextmanager
def recorded() -> Iterator[Kept]:
    """Inside, :func:`kept` puts its results into what this gives."""
    made = Kept()
    with _as(made, None):
        yield made


@contextmanager
def replayed(results: Kept) -> Iterator[None]:
    """Inside, :func:`kept` takes ``results``, in their order, instead of computing."""
    with _as(None, (iter(results.forms), iter(results.arrays))):
        yield


def kept(function: Callable[..., Any], *arrays: mx.array) -> Any:
    """``function(*arrays)``, of floating-point arrays, whose result the block around it keeps, if there is one.

    The result is an array, or a tuple or list of some. What ``function`` calls keeps nothing by itself. Its gradient
    should not need its result, which would be computed again.
    """
    made, given = _record.made, _record.given
    if made is not None:
        with _as(None, None):
            form, results = take_apart(function(*arrays))
        made.arrays += results
        made.forms.append((form, len(results)))
        return put_together(form, results)
    if given is None:
        return function(*arrays)
    forms, values = given
    form, count = next(forms)
    results = list(islice(values, count))

    def again(*inputs: mx.array) -> list[mx.array]:
        with _as(None, None):
            return take_apart(function(*inputs))[1]

    def gradient(inputs: Sequence[mx.array], grads: Sequence[mx.array], _outputs: Any) -> list[mx.array]:
        gradients: list[mx.array] = mx.vjp(again, after(inputs, grads), list(grads))[1]
        return gradients

    return put_together(form, operation(lambda *_: tuple(results), gradient)(*arrays))
