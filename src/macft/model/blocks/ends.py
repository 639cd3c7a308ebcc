"""Which arrays of a model are used before its blocks, and which after them: embedding, norm and head.

No architecture is named here: the model's own code is run with its blocks left out, and the modules that it asks for
arrays are noted. Nothing is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from macft.model.module_classes import Members, replaced_members

BEFORE, AFTER = "before", "after"
BOTH_ENDS = frozenset((BEFORE, AFTER))
"""The ends of a model: what it computes before its blocks, and after them."""
_TOKENS = mx.arange(1, 5)[None]


def ends_of(*, is_first: bool, is_last: bool) -> frozenset[str]:
    """The ends that a node computes which has the first block, the last one, both or neither."""
    return frozenset(end for end, has in ((BEFORE, is_first), (AFTER, is_last)) if has)


@dataclass(frozen=True)
class EndArrays:
    """``names``, in the model, of arrays outside of its blocks, each array once; ``ends``: where they are used."""

    names: tuple[str, ...]
    ends: frozenset[str]


def find_ends(model: nn.Module) -> list[EndArrays]:
    """The parameters outside of the blocks of ``model``, by the ends that use them.

    Those that are in a block too, or that nothing was seen to use, are not among them. Where the model's code fails
    without its blocks, there are none.
    """
    blocks = list(model.layers)
    in_blocks = {id(value) for block in blocks for _, value in tree_flatten(block.parameters())}
    try:
        used = _uses(model, blocks)
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError, KeyError):
        return []
    modules = dict(model.named_modules())
    names: dict[int, str] = {}
    ends: dict[int, frozenset[str]] = {}
    for name, value in tree_flatten(model.parameters()):
        if id(value) in in_blocks:
            continue
        owner = name
        while owner not in modules:
            owner = owner.rpartition(".")[0]
        names.setdefault(id(value), name)
        ends[id(value)] = ends.get(id(value), frozenset()) | used.get(id(modules[owner]), frozenset())
    kinds = (frozenset((BEFORE,)), frozenset((AFTER,)), BOTH_ENDS)
    return [EndArrays(tuple(name for key, name in names.items() if ends[key] == kind), kind) for kind in kinds]


def _uses(model: nn.Module, blocks: list[nn.Module]) -> dict[int, frozenset[str]]:
    """By the id of a module outside of the blocks, when its arrays are asked for."""
    inside = {id(module) for block in blocks for module in block.modules()}
    outside = [module for module in model.modules() if id(module) not in inside and _has_arrays(module)]
    used: dict[int, frozenset[str]] = {}
    called = 0

    def note(module: nn.Module) -> None:
        ends = {BEFORE} if called < len(blocks) else set()
        ends |= {AFTER} if called else set()
        used[id(module)] = used.get(id(module), frozenset()) | ends

    def pass_by(_block: nn.Module, *positional: Any, **named: Any) -> Any:
        nonlocal called
        called += 1
        return positional[0] if positional else next(iter(named.values()))

    with replaced_members(blocks, lambda _: {"__call__": pass_by}), _noted(outside, note):
        model(_TOKENS)
    return used


@contextmanager
def _noted(modules: list[nn.Module], note: Any) -> Iterator[None]:
    """Inside, ``note`` is called with each of ``modules`` whose code asks for what it holds."""

    def members(kind: type[nn.Module]) -> Members:
        attribute, item = kind.__getattr__, kind.__getitem__

        def noted_attribute(module: nn.Module, key: str) -> Any:
            note(module)
            return attribute(module, key)

        def noted_item(module: nn.Module, key: str) -> Any:
            note(module)
            return item(module, key)

        return {"__getattr__": noted_attribute, "__getitem__": noted_item}

    with replaced_members(modules, members):
        yield


def _has_arrays(module: nn.Module) -> bool:
    return any(isinstance(value, mx.array | list) for value in module.values())
