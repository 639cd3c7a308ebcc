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
