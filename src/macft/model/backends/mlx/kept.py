"""Results that a recomputed block keeps, so that its backward pass doesn't compute them a second time.

A block's forward pass records them, in the order in which they are computed; when its backward pass computes the block
again, each takes the place of its computation, and has the gradient of that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx

from macft.model.backends.operation import operation


class _Record(threading.local):
    """``made``: where a block's forward pass puts results; ``given``: what its second computation takes them from."""

    made: list[mx.array] | None = None
    given: Iterator[mx.array] | None = None


_record = _Record()


@contextmanager
def _as(made: list[mx.array] | None, given: Iterator[mx.array] | None) -> Iterator[None]:
    before = _record.made, _record.given
    _record.made, _record.given = made, given
    try:
        yield
    finally:
        _record.made, _record.given = before


@contextmanager
def recorded() -> Iterator[list[mx.array]]:
    """Inside, :func:`kept` puts its results into the list that this gives."""
    made: list[mx.array] = []
    with _as(made, None):
        yield made


@contextmanager
def replayed(results: Sequence[mx.array]) -> Iterator[None]:
    """Inside, :func:`kept` takes ``results``, in their order, instead of computing."""
    with _as(None, iter(results)):
        yield


def kept(function: Callable[..., mx.array], *arrays: mx.array) -> mx.array:
    """``function(*arrays)``, floating-point arrays to one, whose result the block around it keeps, if there is one.

    What ``function`` calls keeps nothing by itself. Its gradient must not need its result.
    """
    made, given = _record.made, _record.given
    if made is None and given is None:
        return function(*arrays)

    def gradient(inputs: Sequence[mx.array], grad_output: mx.array, _output: mx.array) -> Sequence[mx.array]:
        with _as(None, None):
            gradients: list[mx.array] = mx.vjp(function, list(inputs), [grad_output])[1]
        return gradients

    if given is not None:
        result = next(given)
        return operation(lambda *_: result, gradient)(*arrays)
    assert made is not None
    with _as(None, None):
        made.append(function(*arrays))
    return made[-1]
