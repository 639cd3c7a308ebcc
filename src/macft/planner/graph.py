"""How much memory MLX holds at once while it evaluates a graph, by going through the graph as MLX does.

Nothing is evaluated. Sizes are those of the arrays of ``mx.export_function``; the order is that of MLX's evaluation
(breadth first from the results, with a limited width), a buffer is free when its last reader has run, views share the
buffer of what they show, and element-wise operations write over an input that nobody else reads.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

# As in MLX: most operations that wait while the graph is laid in order.
_WIDTH = 20
# MLX's CPU backend runs up to this many operations behind. Inputs are held, and not written over, until an operation
# has run.
_BEHIND = 10
_VIEWS = {
    "AsStrided", "Broadcast", "BroadcastAxes", "CustomTransforms", "Depends", "ExpandDims", "Slice", "Split", "Squeeze",
    "StopGradient", "Transpose", "Unflatten",
}  # fmt: skip
_VIEWS_OF_ROWS = {"Contiguous", "Flatten", "Reshape"}
_IN_PLACE = {
    "Abs", "Add", "AsType", "Copy", "Cos", "Divide", "Erf", "Exp", "LayerNorm", "Log", "Log1p", "LogAddExp", "Maximum",
    "Minimum", "Multiply", "Negative", "Power", "RMSNorm", "RoPE", "Rsqrt", "Scatter", "ScatterAxis", "Select",
    "Sigmoid", "Sign", "Sin", "SliceUpdate", "Softmax", "Sqrt", "Square", "Subtract", "Tanh",
}  # fmt: skip
_COPY_INPUTS = {"AddMM", "LayerNorm", "Matmul", "RMSNorm"}


@dataclass(frozen=True)
class _Operation:
    name: str
    inputs: tuple[str, ...]
    # Names and sizes in bytes.
    outputs: tuple[tuple[str, int], ...]
    arguments: Sequence[Any]


@dataclass
class Graph:
    """The operations of a function, recorded by giving this to ``mx.export_function``."""

    operations: list[_Operation] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    def __call__(self, entry: dict[str, Any]) -> None:
        """Takes what MLX tells of one operation, or of the outputs."""
        if entry["type"] == "outputs":
            self.outputs = [name for name, *_ in entry["outputs"]]
        if entry["type"] == "primitive":
            outputs = tuple((name, math.prod(shape) * dtype.size) for name, shape, dtype in entry["outputs"])
            inputs = tuple(name for name, *_ in entry["inputs"])
            self.operations.append(_Operation(entry["name"], inputs, outputs, entry["arguments"]))

    def peak(self) -> int:
        """The most bytes that exist at once, outputs included, inputs of the function not."""
        return _Memory(self).run(self._in_order())

    def _in_order(self) -> list[_Operation]:
        """The operations as ``mx.eval`` runs them."""
        made_by = {name: operation for operation in self.operations for name, _ in operation.outputs}
        root = _Operation("", tuple(self.outputs), (), ())
        waiting = Counter(id(made_by[n]) for each in (*self.operations, root) for n in each.inputs if n in made_by)
        tape = [root]
        postponed: list[tuple[_Operation, int]] = []
        place = 0
        while place < len(tape) or postponed:
            if place < len(tape):
                operation, start = tape[place], 0
                place += 1
            else:
                operation, start = postponed.pop()
            makers = [made_by[name] for name in operation.inputs if name in made_by]
            for number in range(start, len(makers)):
                if len(tape) - place >= _WIDTH:
                    postponed.append((operation, number))
                    break
                waiting[id(makers[number])] -= 1
                if not waiting[id(makers[number])]:
                    tape.append(makers[number])
        return tape[:0:-1]


class _Memory:
    """Buffers while a graph is evaluated."""

    def __init__(self, graph: Graph):
        self._readers = Counter(graph.outputs)
        for operation in graph.operations:
            self._readers.update(operation.inputs)
        # The buffer of each array; of each buffer its size and the number of arrays in it.
        self._buffer: dict[str, int] = {}
        self._size: list[int] = []
        self._arrays: list[int] = []
        # When an operation last read it: such that may still run hold it.
        self._read_at: dict[int, int] = {}
        # Arrays whose values don't lie row by row, and permutations of axes that views stand for.
        self._scattered: set[str] = set()
        self._transposed: dict[str, tuple[str, list[int]]] = {}
        self._held, self._most = 0, 0
        self._freed: deque[tuple[int, int]] = deque()

    def run(self, operations: Sequence[_Operation]) -> int:
        time = 0
        for operation in operations:
            time += operation.name not in _VIEWS
            if not self._view(operation):
                self._compute(operation, time)
            self._most = max(self._most, self._held)
            for name in operation.inputs:
                self._read(name, time)
            for name, _ in operation.outputs:
                if not self._readers[name]:
                    self._release(name, time)
            while self._freed and self._freed[0][0] <= time - _BEHIND:
                self._held -= self._freed.popleft()[1]
        return self._most

    def _view(self, operation: _Operation) -> bool:
        """Whether the outputs share buffers with inputs; they then do."""
        name, inputs = operation.name, operation.inputs
        if not inputs or not (name in _VIEWS or (name in _VIEWS_OF_ROWS and inputs[0] not in self._scattered)):
            return False
        if name == "Depends":
            sources = inputs[: len(operation.outputs)]
        elif name == "CustomTransforms":
            sources = inputs[-len(operation.outputs) :]
        else:
            sources = (inputs[0],) * len(operation.outputs)
        for (output, _), source in zip(operation.outputs, sources, strict=False):
            if source in self._buffer:
                self._buffer[output] = self._buffer[source]
                self._arrays[self._buffer[source]] += 1
            if name in ("Broadcast", "Slice", "Split") or (source in self._scattered and name != "Transpose"):
                self._scattered.add(output)
            if name == "Transpose":
                self._transpose(output, source, list(operation.arguments[0]))
        return True

    def _transpose(self, output: str, source: str, axes: list[int]) -> None:
        base, before = self._transposed.get(source, (source, list(range(len(axes)))))
        after = [before[axis] for axis in axes]
        self._transposed[output] = base, after
        if base in self._scattered or after != sorted(after):
            self._scattered.add(output)

    def _compute(self, operation: _Operation, time: int) -> None:
        copied = 0
        if operation.name in _COPY_INPUTS:
            copied = sum(self._size[self._buffer[name]] for name in operation.inputs if self._must_copy(name))
        target = self._written_over(operation, time)
        for number, (name, size) in enumerate(operation.outputs):
            if number == 0 and target is not None:
                self._buffer[name] = self._buffer[target]
                self._arrays[self._buffer[target]] += 1
                continue
            self._buffer[name] = len(self._size)
            self._size.append(size)
            self._arrays.append(1)
            self._held += size
        self._held += copied
        if copied:
            self._freed.append((time, copied))

    def _must_copy(self, name: str) -> bool:
        """A matrix product takes a matrix by rows or by columns, and copies others."""
        if name not in self._buffer or name not in self._scattered:
            return False
        base, axes = self._transposed.get(name, (name, []))
        by_columns = [*range(len(axes) - 2), len(axes) - 1, len(axes) - 2] if len(axes) > 1 else []
        return base in self._scattered or axes != by_columns

    def _written_over(self, operation: _Operation, time: int) -> str | None:
        if operation.name not in _IN_PLACE:
            return None
        for name in dict.fromkeys(operation.inputs):
            buffer = self._buffer.get(name)
            if (
                buffer is not None
                and name not in self._scattered
                and self._arrays[buffer] == 1
                and self._read_at.get(buffer, -_BEHIND) <= time - _BEHIND
                and self._readers[name] == operation.inputs.count(name)
                and self._size[buffer] == operation.outputs[0][1]
            ):
                return name
        return None

    def _read(self, name: str, time: int) -> None:
        self._readers[name] -= 1
        if name in self._buffer:
            self._read_at[self._buffer[name]] = time
        if not self._readers[name]:
            self._release(name, time)

    def _release(self, name: str, time: int) -> None:
        buffer = self._buffer.pop(name, None)
        if buffer is None:
            return
        self._arrays[buffer] -= 1
        if not self._arrays[buffer]:
            self._freed.append((time, self._size[buffer]))


def graph_of(function: Any, inputs: Sequence[mx.array], parameters: dict[str, mx.array]) -> Graph:
    """The graph of ``function(*inputs, **parameters)``, arrays to a list of arrays; only their sizes count.

    Raises:
        ValueError: an operation in it can't be exported, or needs values.
    """
    graph = Graph()
    named: dict[str, Any] = dict(parameters)
    mx.export_function(graph, function, *inputs, **named)
    return graph
