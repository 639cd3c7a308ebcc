"""Weights of a model's blocks that are in memory only while a block is computed.

Frozen weights never change, so that losing them costs a read, and nothing is written. A block's arrays are put into the
model's modules before it is computed, and taken out afterwards. In their place are arrays of the same shapes and types
that take no memory. While a block is computed, a thread reads the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from macft.errors import ModelError
from macft.model.module_classes import Members, replaced_members
from macft.model.reading_thread import in_reading_thread

Arrays = list[mx.array]
BlockReader = Callable[[int], Arrays]
"""The number of a block to its arrays, which are evaluated."""
Place = tuple[Any, Any]
"""A module, dict or list that holds an array, and its key there."""


class BlockWeights:
    """The frozen arrays of ``model``'s blocks. Made before an adapter is added; the arrays are not read yet.

    Args:
        read: makes a model with the same weights anew, as arrays that are not read yet. Called in another thread.
        resident: numbers of the blocks that stay in memory once they are read.
        source: names the files in errors.
    """

    def __init__(self, model: nn.Module, read: Callable[[], nn.Module], *, resident: Iterable[int], source: str):
        self._model = model
        self._blocks = list(model.layers)
        self._resident = frozenset(resident)
        self._source = source
        self._names = _own_names(model)
        self._reader: BlockReader = _Reader(read, self._names)
        self._current = [_named(block, names) for block, names in zip(self._blocks, self._names, strict=True)]
        self._unread: list[Arrays] | None = list(self._current)
        self._empty = [[_placeholder(array) for array in arrays] for arrays in self._current]
        self._places: list[list[list[Place]]] = [[[] for _ in names] for names in self._names]
        self._held: set[int] = set()
        self._ahead: tuple[int, Future[Arrays]] | None = None
        self._is_left_out = False
        self.waited = 0.0
        """Seconds that a computation has waited for weights, since :meth:`take_figures`."""
        self.read_bytes = 0
        """Bytes of arrays that were read, as they are in memory, since then."""
        self.follow(model)
        self._installed = ExitStack()  # as long as the model is used
        self._installed.enter_context(self._on_demand())
        own = {id(array) for arrays in self._current for array in arrays}
        mx.eval([value for value in _all_arrays(model) if id(value) not in own])
        for number, arrays in enumerate(self._empty):
            self._put(number, arrays)

    @property
    def resident(self) -> frozenset[int]:
        """Blocks that stay in memory once they are read; others are dropped when this is set."""
        return self._resident

    @resident.setter
    def resident(self, numbers: Iterable[int]) -> None:
        self._resident = frozenset(numbers)
        for number in self._held - self._resident:
            self.drop(number)

    def follow(self, model: nn.Module) -> None:
        """Keeps ``model`` supplied too: a copy of this one that holds the same arrays."""
        slots = {id(array): (n, slot) for n, arrays in enumerate(self._current) for slot, array in enumerate(arrays)}
        for container, key, array in _walk(model):
            if id(array) in slots:
                number, slot = slots[id(array)]
                places = self._places[number][slot]
                if not any(held is container and held_key == key for held, held_key in places):
                    places.append((container, key))

    @contextmanager
    def adapting(self) -> Iterator[None]:
        """Inside, layers may be made that have trained parameters which follow from the weights (DoRA's).

        At the end those are computed, block by block. It can be done once.
        """
        assert self._unread is not None
        unread, self._unread = self._unread, None
        absent = [number for number in range(len(self._blocks)) if number not in self._held]
        for number in absent:
            self._put(number, unread[number])
        try:
            yield
            for number, block in enumerate(self._blocks):
                mx.eval(block.trainable_parameters())
                if number in absent:
                    unread[number] = []
                    self._put(number, self._empty[number])
        finally:
            for number in absent:
                self._put(number, self._empty[number])

    @contextmanager
    def held(self, number: int, *, then: Sequence[int] = ()) -> Iterator[None]:
        """Inside, block ``number`` has its weights, and the first of the blocks ``then`` that needs it is read.

        Raises:
            ModelError: they can't be read.
        """
        if number not in self._held:
            self._put(number, self._take(number))
            self._held.add(number)
        self.read_ahead(then)
        try:
            yield
        finally:
            if number not in self._resident and number not in then[:1]:
                self.drop(number)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Inside, blocks are computed without their weights, where only the graph is of interest."""
        self._is_left_out = True
        try:
            yield
        finally:
            self._is_left_out = False

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Inside, blocks get random values instead of being read: to try the model's code. None is held afterwards."""
        before = self.replace_reader(lambda _: self._random)
        try:
            yield
        finally:
            self._reader, self._ahead = before, None
            self.take_figures()
            for number in list(self._held):
                self.drop(number)

    def _random(self, number: int) -> Arrays:
        keys = mx.random.split(mx.random.key(number), 2 * len(self._empty[number]))
        arrays = [
            _product(array, keys[2 * place], keys[2 * place + 1]) for place, array in enumerate(self._empty[number])
        ]
        mx.eval(arrays)
        return arrays

    def read_ahead(self, numbers: Sequence[int]) -> None:
        """Begins to read the first of these blocks that is not in memory, unless another one is being read."""
        if self._ahead is None:
            missing = next((number for number in numbers if number not in self._held), None)
            if missing is not None:
                self._ahead = missing, in_reading_thread(self._reader, missing)

    def drop(self, number: int) -> None:
        """Frees the weights of block ``number``."""
        if number in self._held:
            self._held.discard(number)
            self._put(number, self._empty[number])

    def replace_reader(self, make: Callable[[BlockReader], BlockReader]) -> BlockReader:
        """Reads blocks with what ``make`` makes of the reader that there is, which is returned."""
        before, self._reader = self._reader, make(self._reader)
        return before

    def take_figures(self) -> tuple[float, int]:
        """Seconds waited and bytes read since the last call."""
        figures = self.waited, self.read_bytes
        self.waited, self.read_bytes = 0.0, 0
        return figures

    @contextmanager
    def _on_demand(self) -> Iterator[None]:
        """Inside, a block of the model that is called without weights gets them for that call.

        This is how code that calls the whole model, generation for one, works: right, and as slow as the disk.
        """
        numbers = {id(block): number for number, block in enumerate(self._blocks)}
        count = len(self._blocks)

        def members(kind: type[nn.Module]) -> Members:
            call = kind.__call__

            def supplied(block: nn.Module, *positional: Any, **named: Any) -> Any:
                number = numbers.get(id(block))
                if number is None or number in self._held or self._is_left_out:
                    return call(block, *positional, **named)
                following = [(number + distance) % count for distance in range(1, count)]
                with self.held(number, then=following):
                    output = call(block, *positional, **named)
                    # With its caches, which would keep the weights as long as they are not computed.
                    mx.eval([value for _, value in tree_flatten([output, *map(_state, _caches(positional, named))])])
                return output

            return {"__call__": supplied}

        with replaced_members(self._blocks, members):
            yield

    def _take(self, number: int) -> Arrays:
        if self._ahead is not None and self._ahead[0] == number:
            future = self._ahead[1]
        else:
            future = in_reading_thread(self._reader, number)
        self._ahead = None
        started = time.perf_counter()
        try:
            arrays = future.result()
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ModelError(f"{self._source}: the weights of block {number} can't be read: {reason}") from error
        self.waited += time.perf_counter() - started
        self.read_bytes += sum(int(array.nbytes) for array in arrays)
        return arrays

    def _put(self, number: int, arrays: Arrays) -> None:
        self._current[number] = arrays
        for places, array in zip(self._places[number], arrays, strict=True):
            for container, key in places:
                container[key] = array


class _Reader:
    """Reads one block's arrays. A model made by ``read`` serves one read of each block; then the next one is made."""

    def __init__(self, read: Callable[[], nn.Module], names: Sequence[Sequence[str]]):
        self._read, self._names = read, names
        self._fresh: dict[int, Arrays] = {}

    def __call__(self, number: int) -> Arrays:
        if number not in self._fresh:
            self._fresh = self._all()
        arrays = self._fresh.pop(number)
        mx.eval(arrays)
        return arrays

    def _all(self) -> dict[int, Arrays]:
        model = self._read()
        fresh = {}
        for number, (block, names) in enumerate(zip(model.layers, self._names, strict=True)):
            fresh[number] = _named(block, names)
            own = {id(array) for array in fresh[number]}
            for container, key, array in list(_walk(block)):  # so that this model holds nothing that is read
                if id(array) in own:
                    container[key] = _placeholder(array)
        return fresh


def _own_names(model: nn.Module) -> list[list[str]]:
    """Of each block, the names in it of the arrays that no other block and nothing else of the model holds."""
    by_block = [tree_flatten(block.parameters()) for block in model.layers]
    everywhere = [id(value) for _, value in tree_flatten(model.parameters())]
    counts: dict[int, int] = {}
    for identity in everywhere:
        counts[identity] = counts.get(identity, 0) + 1
    return [[name for name, value in block if counts.get(id(value)) == 1] for block in by_block]


def _named(block: nn.Module, names: Sequence[str]) -> Arrays:
    values = dict(tree_flatten(block.parameters()))
    return [values[name] for name in names]


def _placeholder(array: mx.array) -> mx.array:
    """An array of this shape and type that takes no memory. Floating-point ones are NaN, so that no use is silent."""
    value = float("nan") if mx.issubdtype(array.dtype, mx.floating) else 0
    placeholder = mx.broadcast_to(mx.array(value, array.dtype), array.shape)
    mx.eval(placeholder)
    return placeholder


def _product(like: mx.array, one: mx.array, other: mx.array) -> mx.array:
    """A matrix of the shape and type of ``like``, made of two random vectors: that takes little time."""
    *_, rows, columns = (1, 1, *like.shape)
    if mx.issubdtype(like.dtype, mx.floating):
        left, right = mx.random.normal((rows, 1), key=one), mx.random.normal((columns,), key=other)
        values = (left * right * 0.1).astype(like.dtype)
    else:
        left, right = (
            mx.random.randint(0, 100, size, key=key) for size, key in (((rows, 1), one), ((columns,), other))
        )
        values = (left ^ right).astype(like.dtype)
    return mx.contiguous(mx.broadcast_to(values.reshape(values.shape[2 - min(like.ndim, 2) :]), like.shape))


def _all_arrays(model: nn.Module) -> Arrays:
    return [array for _, _, array in _walk(model)]


def _walk(tree: Any) -> Iterator[tuple[Any, Any, mx.array]]:
    """Each array in ``tree``, with the module, dict or list that holds it and its key there."""
    items = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree))
    for key, value in items:
        if isinstance(value, mx.array):
            yield tree, key, value
        elif isinstance(value, dict | list):
            yield from _walk(value)
    if isinstance(tree, nn.Module):
        yield from ((vars(tree), name, value) for name, value in vars(tree).items() if isinstance(value, mx.array))


def _caches(positional: Sequence[Any], named: dict[str, Any]) -> list[Any]:
    return [value for value in (*positional, *named.values()) if hasattr(value, "__dict__")]


def _state(cache: Any) -> list[Any]:
    """The arrays of a key-value cache or a recurrent state."""
    values = vars(cache).values()
    return [value for value in values if isinstance(value, mx.array | list | tuple) and value is not None]
