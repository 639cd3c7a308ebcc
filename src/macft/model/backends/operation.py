"""One operation to MLX, with a gradient of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import mlx.core as mx

Result = TypeVar("Result")


def operation(
    forward: Callable[..., Result], backward: Callable[[Sequence[mx.array], Any, Result], Sequence[mx.array]]
) -> Callable[..., Result]:
    """``forward``, arrays to an array or a tuple of them, differentiated by ``backward``.

    ``backward(inputs, grad_output, output)`` returns the gradient by each input; ``grad_output`` is built as
    ``output`` is. (``mx.custom_function``, which gives and takes no sequence where there is one input.)
    """
    function = mx.custom_function(forward)

    @function.vjp
    def _vjp(inputs: Any, grad_output: Any, output: Result) -> Any:
        gradients = tuple(backward(inputs if isinstance(inputs, list | tuple) else [inputs], grad_output, output))
        return gradients if len(gradients) > 1 else gradients[0]

    return cast(Callable[..., Result], function)


def after(values: Sequence[mx.array], gradients: Sequence[mx.array]) -> list[mx.array]:
    """``values``, each by itself, computed when the ``gradients`` are, and not before.

    A ``backward`` that differentiates its inputs by ``mx.vjp`` gives it these: with the inputs as they are,
    ``mx.compile`` fails where operations are inside of one another (mlx 0.32: "_Map_base::at").
    """
    return [mx.depends([value], list(gradients))[0] for value in values]
