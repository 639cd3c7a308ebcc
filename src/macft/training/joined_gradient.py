"""Loss and gradient by parameters that are joined: what is done with each of them is done with all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import mlx.core as mx

from macft.model.joined_parameters import Joined, JoinedParameters

Loss = Callable[..., mx.array]


def joined_value_and_grad(
    parameters: JoinedParameters, loss: Loss, types: Mapping[str, mx.Dtype]
) -> Callable[..., tuple[mx.array, dict[str, mx.array]]]:
    """A function of joined parameters and the inputs of ``loss`` to the loss, and its gradient, joined, in float32.

    ``types``: by name of a parameter, another type in which the model uses it. A long array is cast to it, instead of
    each parameter, and so is the gradient to float32.
    """

    def value_and_grad(joined: Joined, *inputs: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
        parts = parameters.split(joined)
        for wanted in {kind for name, kind in types.items() if parts[name].dtype != kind}:
            cast = parameters.split({key: value.astype(wanted) for key, value in joined.items()})
            parts |= {name: cast[name] for name, kind in types.items() if kind == wanted}

        def of_parts(parts: dict[str, mx.array], *inputs: mx.array) -> mx.array:
            with parameters.holding(parts):
                return loss(*inputs)

        value, gradient = mx.value_and_grad(of_parts)(parts, *inputs)
        return value, {key: array.astype(mx.float32) for key, array in _joined(parameters, gradient).items()}

    return value_and_grad


def _joined(parameters: JoinedParameters, gradient: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """``gradient`` joined, in float32 where it has several types."""
    mixed = {
        name: gradient[name].astype(mx.float32)
        for names in parameters.groups.values()
        if len({gradient[name].dtype for name in names}) > 1
        for name in names
    }
    return parameters.join({**gradient, **mixed})
