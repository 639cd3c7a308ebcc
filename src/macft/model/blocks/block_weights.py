"""Weights of a model's blocks that are in memory only while a block is computed.

Frozen weights never change, so that losing them costs a read, and nothing is written. A block's arrays are put into the
model's modules before it is computed, and taken out afterwards. In their place are arrays of the same shapes and types
that take no memory. While a block is computed, a thread reads the next one.

What is before and after the blocks, embedding, norm and head, is in memory from the start, or, for a node that computes
a part of the blocks, while one of its ends is wanted (:attr:`BlockWeights.ends`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from macft.errors import ModelError
from macft.model.blocks.ends import BOTH_ENDS, EndArrays, find_ends
from macft.model.blocks.reading_thread import in_reading_thread
from macft.model.blocks.stand_ins import placeholder, product, shifted
from macft.model.module_classes import Members, replaced_members

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
        reads_ends: what is around the blocks is not read either, until :attr:`ends` asks for it.
    """

    def __init__(
        self,
        model: nn.Module,
        read: Callable[[], nn.Module],
        *,
        resident: Iterable[int],
        source: str,
        reads_ends: bool = False,
    ):
        self._model = model
        self._blocks = list(model.layers)
        self._resident = frozenset(resident)
        self._source = source
        # Parts are numbered: the blocks, then the ends' arrays. What is said of blocks below is true of all of them.
        self._end_parts: list[EndArrays] = find_ends(model) if reads_ends else []
        self._names = [*_own_names(model), *(list(part.names) for part in self._end_parts)]
        self._reader: BlockReader = _Reader(read, self._names)
        self._current = [
            _named(owner, names) for owner, names in zip(_owners(model, self._names), self._names, strict=True)
        ]
        self._unread: list[Arrays] | None = list(self._current)
        self._empty = [[placeholder(array) for array in arrays] for arrays in self._current]
        self._places: list[list[list[Place]]] = [[[] for _ in names] for names in self._names]
        self._held: set[int] = set()
        self._ends: frozenset[str] = frozenset() if reads_ends else BOTH_ENDS
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
        for number in self.held_blocks - self._resident:
            self.drop(number)

    @property
    def held_blocks(self) -> frozenset[int]:
        """Blocks whose weights are in memory."""
        return frozenset(number for number in self._held if number < len(self._blocks))

    @property
    def ends(self) -> frozenset[str]:
        """The ends of the model (:mod:`~macft.model.blocks.ends`) that are in memory; setting it reads and drops.

        Raises:
            ModelError: they can't be read.
        """
        return self._ends

    @ends.setter
    def ends(self, wanted: Iterable[str]) -> None:
        wanted = frozenset(wanted)
        needed = [number for number, part in enumerate(self._end_parts, start=len(self._blocks)) if part.ends & wanted]
        for number in self._held - self.held_blocks - set(needed):
            self.drop(number)
        for number in needed:
            if number not in self._held:
                self._put(number, self._result(in_reading_thread(self._reader, number), "the embedding or the head"))
                self._held.add(number)
        self._ends = wanted

    def blocks_beside(self, ends: Collection[str], others: Collection[str]) -> int:
        """How many blocks take as much memory as ``ends`` take more than ``others``, rounded up; 0 for less."""
        more = sum(
            self._bytes(number) * (bool(part.ends & set(ends)) - bool(part.ends & set(others)))
            for number, part in enumerate(self._end_parts, start=len(self._blocks))
        )
        block = max(1, max(self._bytes(number) for number in range(len(self._blocks))))
        return max(0, -(-more // block))

    def _bytes(self, number: int) -> int:
        return sum(int(array.nbytes) for array in self._empty[number])

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
        """Inside, nothing is read on demand: only the graph is of interest, or what is needed is held already."""
        before, self._is_left_out = self._is_left_out, True
        try:
            yield
        finally:
            self._is_left_out = before

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Inside, blocks and ends get random values instead of being read: to try the model's code.

        None of these is held afterwards.
        """
        before, ends = self.replace_reader(lambda _: self._random), self._ends
        try:
            yield
        finally:
            self._reader, self._ahead = before, None
            self.take_figures()
            for number in list(self._held):
                self.drop(number)
            self.ends = ends

    def _random(self, number: int) -> Arrays:
        keys = mx.random.split(mx.random.key(number), 2 * len(self._empty[number]))
        make = product if number < len(self._blocks) else shifted
        arrays = [make(array, keys[2 * place], keys[2 * place + 1]) for place, array in enumerate(self._empty[number])]
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

        This is how code that calls the whole model, generation for one, works: right, and as slow as the disk. Its
        ends are read, too, and stay until :attr:`ends` is set.
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

        def whole(kind: type[nn.Module]) -> Members:
            call = kind.__call__

            def supplied(model: nn.Module, *positional: Any, **named: Any) -> Any:
                if model is self._model and not self._is_left_out and self._ends != BOTH_ENDS:
                    self.ends = BOTH_ENDS
                return call(model, *positional, **named)

            return {"__call__": supplied}

        with replaced_members(self._blocks, members):
            if not self._end_parts:
                yield
                return
            with replaced_members([self._model], whole):
                yield

    def _take(self, number: int) -> Arrays:
        if self._ahead is not None and self._ahead[0] == number:
            future = self._ahead[1]
        else:
            future = in_reading_thread(self._reader, number)
        self._ahead = None
        return self._result(future, f"block {number}")

    def _result(self, future: Future[Arrays], what: str) -> Arrays:
        started = time.perf_counter()
        try:
            arrays = future.result()
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ModelError(f"{self._source}: the weights of {what} can't be read: {reason}") from error
        self.waited += time.perf_counter() - started
        self.read_bytes += sum(int(array.nbytes) for array in arrays)
        return arrays

    def _put(self, number: int, arrays: Arrays) -> None:
        self._current[number] = arrays
        for places, array in zip(self._places[number], arrays, strict=True):
            for container, key in places:
                container[key] = array


class _Reader:
    """Reads one part's arrays. A model made by ``read`` serves one read of each part; then the next one is made."""

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
        owners = _owners(model, self._names)
        fresh = {
            number: _named(owner, names) for number, (owner, names) in enumerate(zip(owners, self._names, strict=True))
        }
        own = {id(array) for arrays in fresh.values() for array in arrays}
        for container, key, array in list(_walk(model)):  # so that this model holds nothing that is read
            if id(array) in own:
                container[key] = placeholder(array)
        return fresh


def _own_names(model: nn.Module) -> list[list[str]]:
    """Of each block, the names in it of the arrays that no other block and nothing else of the model holds."""
    by_block = [tree_flatten(block.parameters()) for block in model.layers]
    everywhere = [id(value) for _, value in tree_flatten(model.parameters())]
    counts: dict[int, int] = {}
    for identity in everywhere:
        counts[identity] = counts.get(identity, 0) + 1
    return [[name for name, value in block if counts.get(id(value)) == 1] for block in by_block]


def _owners(model: nn.Module, names: Sequence[Sequence[str]]) -> Iterator[nn.Module]:
    """What the names of each part begin at: the block, or the model."""
    blocks = list(model.layers)
    yield from blocks
    for _ in names[len(blocks) :]:
        yield model


def _named(block: nn.Module, names: Sequence[str]) -> Arrays:
    values = dict(tree_flatten(block.parameters()))
    return [values[name] for name in names]


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
