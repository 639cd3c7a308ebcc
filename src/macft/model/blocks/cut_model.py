"""A model cut into what is before its blocks, the blocks, and what is after them.

No architecture is named here. The model's own code is run with its blocks left out, which shows how it calls each of
them, and with the last block's result put in, which shows what it makes of that. So embeddings that are scaled, masks
and other arguments of a block are as the model makes them. Numbers of blocks are those in the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from macft.model.blocks.ends import AFTER, BEFORE, BOTH_ENDS
from macft.model.module_classes import Members, ModuleCall, replaced_members

Answer = Callable[[int, ModuleCall, mx.array, "Arguments"], Any]
"""What stands in for a block: its number, its own call, the hidden states and the other arguments."""


@dataclass(frozen=True)
class Arguments:
    """What a model gives a block besides hidden states: masks and the like.

    ``hidden_name`` is the name by which it gives hidden states; empty where they are the first argument.
    """

    positional: tuple[Any, ...]
    named: dict[str, Any]
    hidden_name: str = ""

    def given_to(self, call: Callable[..., Any], hidden: mx.array) -> Any:
        """Calls ``call``, a block, with ``hidden`` (rows, length, d) and these arguments."""
        if self.hidden_name:
            return call(*self.positional, **{self.hidden_name: hidden}, **self.named)
        return call(hidden, *self.positional, **self.named)

    @property
    def arrays(self) -> list[mx.array]:
        """All arrays among them."""
        values = [value for _, value in tree_flatten([list(self.positional), self.named])]
        return [value for value in values if isinstance(value, mx.array)]

    def equal(self, other: Arguments) -> bool:
        """Whether both hold the same values."""
        mine, others = (tree_flatten([list(each.positional), each.named]) for each in (self, other))
        return len(mine) == len(others) and all(
            name == other_name and _equal(value, other_value)
            for (name, value), (other_name, other_value) in zip(mine, others, strict=True)
        )


@dataclass(frozen=True)
class Entry:
    """``hidden`` (rows, length, d), the first block's input, and each block's other arguments."""

    hidden: mx.array
    arguments: Sequence[Arguments]

    @property
    def arrays(self) -> list[mx.array]:
        """All of its arrays."""
        return [self.hidden, *(array for each in self.arguments for array in each.arrays)]


class CutModel:
    """``model``, executed in parts.

    ``call`` is the part of the model that is cut, from tokens (rows, length) on: its backbone or the whole model.
    ``same_form``: hidden states must have the same shape and type between all blocks.
    """

    def __init__(
        self, model: nn.Module, call: Callable[[mx.array], mx.array] | None = None, *, same_form: bool = False
    ):
        self._same_form = same_form
        self.blocks: list[nn.Module] = list(model.layers)
        self._call = call or model
        self._numbers = {id(block): number for number, block in enumerate(self.blocks)}

    def enter(self, inputs: mx.array, *, to_end: bool = False) -> Entry:
        """The first block's input for the tokens ``inputs`` (rows, length), and all blocks' arguments. No block runs.

        The model's code is left when it has called its last block; with ``to_end`` it is run to its end, to see whether
        blocks are called again.

        Raises:
            ValueError: not every block was called, once each and in their order.
        """
        seen: list[tuple[int, mx.array, Arguments]] = []

        def record(number: int, _call: ModuleCall, hidden: mx.array, arguments: Arguments) -> mx.array:
            seen.append((number, hidden, arguments))
            if len(seen) == len(self.blocks) and not to_end:
                raise _Entered
            return hidden

        with self._answered_by(record), suppress(_Entered):
            self._call(inputs)
        if [number for number, _, _ in seen] != list(range(len(self.blocks))):
            raise ValueError("it doesn't call its blocks once each, in their order")
        return Entry(seen[0][1], [arguments for _, _, arguments in seen])

    def block(self, number: int, hidden: mx.array, arguments: Arguments) -> mx.array:
        """What block ``number`` makes of ``hidden`` (rows, length, d), in the same shape."""
        output: mx.array = arguments.given_to(self.blocks[number], hidden)
        return output

    def leave(self, inputs: mx.array, hidden: mx.array) -> mx.array:
        """What the model makes of ``hidden`` (rows, length, d), the last block's result for the tokens ``inputs``.

        ``inputs`` is (rows, length). Logits (rows, length, vocabulary), or of a backbone normed hidden states.
        """
        last = len(self.blocks) - 1
        with self._answered_by(lambda number, _call, before, _: hidden if number == last else before):
            return self._call(inputs)

    @contextmanager
    def skipped(self) -> Iterator[None]:
        """Inside, no block is computed, and the last one returns random values: to try what is after them by itself."""
        last = len(self.blocks) - 1
        with self._answered_by(lambda number, _call, hidden, _: _random_like(hidden) if number == last else hidden):
            yield

    def obstacle(
        self,
        inputs: mx.array,
        numbers: range | None = None,
        held: Callable[[int], AbstractContextManager[None]] = lambda _: nullcontext(),
        ends: Collection[str] = BOTH_ENDS,
    ) -> str | None:
        """Why the parts do not make the whole model, found by trial on the tokens ``inputs``; None if they do.

        Every block of ``numbers`` (None: of the model) is computed once, inside ``held``, the others never. Blocks that
        return more than hidden states, share keys and values, or get arguments that depend on what earlier blocks
        computed can't be cut apart. Of the model's ends only ``ends`` have values, and are tried.
        """
        try:
            entry = self.enter(inputs, to_end=True)
            if BEFORE not in ends:
                if obstacle := arguments_need_values(entry):
                    return obstacle
                entry = Entry(_random_like(entry.hidden), entry.arguments)
            mx.eval(entry.arrays)
            numbers = range(len(self.blocks)) if numbers is None else numbers
            return self._differences(inputs, entry, numbers, held, ends)
        except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return f"its own code fails without them: {lines[0]}"

    def _differences(
        self,
        inputs: mx.array,
        entry: Entry,
        numbers: range,
        held: Callable[[int], AbstractContextManager[None]],
        ends: Collection[str],
    ) -> str | None:
        found: list[str] = []
        hidden = entry.hidden

        def compare(number: int, call: ModuleCall, given: mx.array, arguments: Arguments) -> Any:
            nonlocal hidden
            if number == 0 and BEFORE not in ends:
                given = hidden
            if not _equal(given, hidden):
                before = f"block {number - 1} returns" if number else "the tokens alone give"
                found.append(f"block {number} gets something else than {before}")
            if not arguments.equal(entry.arguments[number]):
                found.append(f"the arguments of block {number} depend on other blocks")
            if number not in numbers:
                return hidden
            with held(number):
                hidden = arguments.given_to(partial(call, self.blocks[number]), given)
                if not isinstance(hidden, mx.array):
                    raise TypeError("a block returns more than hidden states")
                mx.eval(hidden)
            if self._same_form and (hidden.shape, hidden.dtype) != (given.shape, given.dtype):
                found.append(f"block {number} changes the shape or the type of hidden states")
            return hidden

        with self._answered_by(compare):
            whole = self._call(inputs)
        if not found and AFTER in ends and not _equal(self.leave(inputs, hidden), whole):
            found.append("what follows the blocks depends on more than the last one")
        return found[0] if found else None

    @contextmanager
    def _answered_by(self, answer: Answer) -> Iterator[None]:
        def members(kind: type[nn.Module]) -> Members:
            call = kind.__call__

            def answered(block: nn.Module, *positional: Any, **named: Any) -> Any:
                number = self._numbers[id(block)]
                if positional:
                    return answer(number, call, positional[0], Arguments(positional[1:], named))
                name, hidden = next(iter(named.items()))
                return answer(number, call, hidden, Arguments((), {k: named[k] for k in named if k != name}, name))

            return {"__call__": answered}

        with replaced_members(self.blocks, members):
            yield


class _Entered(Exception):
    """All blocks have been called, and the rest of the model's code is of no interest."""


def arguments_need_values(entry: Entry) -> str | None:
    """Why the arguments of ``entry`` can't be made where the embedding has no values but NaN; None if they can."""
    for number, arguments in enumerate(entry.arguments):
        for array in arguments.arrays:
            if mx.issubdtype(array.dtype, mx.floating) and bool(mx.isnan(array).any().item()):
                return f"the arguments of block {number} depend on the embedding's values"
    return None


def _random_like(hidden: mx.array) -> mx.array:
    values: mx.array = mx.random.normal(hidden.shape, key=mx.random.key(0)).astype(hidden.dtype)
    return values


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, mx.array) and isinstance(other, mx.array):
        same_kind = one.shape == other.shape and one.dtype == other.dtype
        return one is other or (same_kind and bool(mx.array_equal(one, other, equal_nan=True)))
    are_arrays = isinstance(one, mx.array) or isinstance(other, mx.array)
    return one is other or (not are_arrays and bool(one == other))
