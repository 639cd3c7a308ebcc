"""Blocks of which the backward pass holds the input only, and computes the rest again (Chen et al. 2016).

As ``mlx_lm.tuner.trainer.grad_checkpoint``, which changes a class, and with it every model of that architecture, for
the rest of the process. This changes the blocks of one model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from macft.model.backends.trees import holds_state
from macft.model.module_classes import Members, replaced_members


@contextmanager
def checkpointed_blocks(model: nn.Module) -> Iterator[None]:
    """Inside, the blocks of ``model`` are checkpointed, of whatever kinds they are."""
    with replaced_members(model.layers, _checkpointed):
        yield


def _checkpointed(kind: type[nn.Module]) -> Members:
    call = kind.__call__

    def checkpointed_call(block: nn.Module, *arguments: Any, **named: Any) -> Any:
        if holds_state((arguments, named)):  # what it writes there would be without a gradient
            return call(block, *arguments, **named)

        def computed(parameters: dict[str, Any], *arguments: Any, **named: Any) -> Any:
            block.update(parameters)
            return call(block, *arguments, **named)

        return mx.checkpoint(computed)(block.trainable_parameters(), *arguments, **named)

    return {"__call__": checkpointed_call}
