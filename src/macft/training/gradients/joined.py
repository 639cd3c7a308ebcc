"""Loss and gradient by parameters that are joined: what is done with each of them is done with all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx

from macft.model.joined_parameters import Joined, JoinedParameters, join

Loss = Callable[..., mx.array]


def joined_value_and_grad(
    parameters: JoinedParameters, loss: Loss, types: Mapping[str, mx.Dtype], groups: Mapping[str, Sequence[str]]
) -> Callable[..., tuple[mx.array, dict[str, mx.array]]]:
    """A function of joined parameters and the inputs of ``loss`` to the loss, and its gradient, float32.

    The gradient is joined by ``groups`` of names, which may be smaller than those of the parameters. ``types``: by name
    of a parameter, another type in which the model uses it. A long array is cast to it, instead of each parameter, and
    so is the gradient to float32.
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
        return value, {key: array.astype(mx.float32) for key, array in _joined(groups, gradient).items()}

    return value_and_grad


def _joined(groups: Mapping[str, Sequence[str]], gradient: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """``gradient`` joined, in float32 where a group has several types."""
    mixed = {
        name: gradient[name].astype(mx.float32)
        for names in groups.values()
        if len({gradient[name].dtype for name in names}) > 1
        for name in names
    }
    return join(groups, {**gradient, **mixed})
