"""A model whose blocks' weights are supplied one by one, executed for parts of a node's rows."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from macft.collective.array_bytes import overwrite
from macft.model.backends.base import Backend, CrossEntropy
from macft.model.blocks.block_weights import BlockWeights
from macft.model.blocks.cut_model import CutModel, Entry
from macft.model.blocks.ends import AFTER
from macft.model.head import split_head
from macft.model.packing import PackLayout, packed
from macft.model.parameter_refs import ParameterRefs
from macft.training.batch_layout import DeviceBatch
from macft.training.gradients.buckets import Gradient


@dataclass
class Work:
    """A part of the node's rows on its way through the blocks; ``hidden`` is the newest block's result."""

    part: DeviceBatch
    arrays: list[mx.array]
    layout: PackLayout | None
    keys: mx.array
    entry: Entry | None = None
    hidden: mx.array = field(default_factory=lambda: mx.zeros(()))
    # By block number, the inputs that the backward pass needs.
    kept: dict[int, mx.array] = field(default_factory=dict)
    # By block number, where the gradient by its result goes, and the gradients that follow from it.
    pending: dict[int, tuple[mx.array, list[mx.array]]] = field(default_factory=dict)

    @classmethod
    def of(cls, part: DeviceBatch, keys: mx.array) -> Work:
        return cls(part, part.loss_inputs(), part.pack_layout(), keys)

    def finished(self) -> Work:
        """This one without its arrays on the device."""
        return replace(self, arrays=[], layout=None, entry=None, hidden=self.keys, kept={}, pending={})

    @property
    def target_tokens(self) -> int:
        """Number of targets."""
        return int(self.part.weights.sum())


class StagedModel:
    """The blocks ``weights`` supplies, executed for parts of rows, and the loss of what they compute.

    ``model`` must be installed in ``backend``. Each of the backend's lanes has a model of its own.
    """

    def __init__(self, model: nn.Module, backend: Backend, weights: BlockWeights):
        self.lanes = backend.lanes(model)
        self.weights = weights
        self._model, self._backend = model, backend
        for each in self.lanes.models:
            weights.follow(each)
        self._cuts = [CutModel(each) for each in self.lanes.models]
        # Of each lane, what is after the blocks, and the loss.
        self._exits: list[tuple[CutModel, CrossEntropy]] = []
        self.have_ends(weights.ends)
        self._refs = [[ParameterRefs(block) for block in cut.blocks] for cut in self._cuts]
        names = {id(module): name for name, module in model.named_modules()}
        self.prefixes = [names[id(block)] for block in self._cuts[0].blocks]

    def have_ends(self, wanted: Collection[str]) -> None:
        """Has the ends ``wanted`` of the model, and not others, in memory. The loss needs what is after the blocks.

        Raises:
            ModelError: they can't be read.
        """
        self._exits = []
        self.ends = self.weights.ends = frozenset(wanted)
        if AFTER not in wanted:
            return
        with self.weights.left_out():
            for each in self.lanes.models:
                with CutModel(each).skipped():
                    parts = split_head(each)
                loss = self._backend.cross_entropy(parts[1] if parts else None)
                self._exits.append((CutModel(each, parts[0] if parts else None), loss))

    @property
    def count(self) -> int:
        """Number of blocks."""
        return len(self._refs[0])

    def parameters_of(self, number: int) -> list[str]:
        """Names in the model of the trained parameters of block ``number``."""
        return [f"{self.prefixes[number]}.{name}" for name in self._refs[0][number].names]

    def enter(self, lane: int, work: Work, *, embed: bool = True) -> Work:
        """Computes what is before the blocks; without ``embed`` only the blocks' other arguments."""
        with packed(work.layout), self.weights.left_out():
            entry = work.entry = self._cuts[lane].enter(work.arrays[0])
            mx.eval(entry.arrays if embed else [array for each in entry.arguments for array in each.arrays])
        work.hidden = entry.hidden
        return work

    def forward(self, number: int, lane: int, work: Work, *, training: bool) -> Work:
        """Computes block ``number``."""
        assert work.entry is not None
        cut, arguments = self._cuts[lane], work.entry.arguments[number]
        with packed(work.layout):

            def block(hidden: mx.array) -> mx.array:
                return cut.block(number, hidden, arguments)

            work.hidden = self._backend.value(block, work.hidden) if training else block(work.hidden)
            mx.eval(work.hidden)
        return work

    def loss(self, lane: int, work: Work) -> float:
        """The summed loss of what the last block has computed, in nats, without a gradient."""
        inputs, positions, targets, weights = work.arrays
        cut, cross_entropy = self._exits[lane]
        with packed(work.layout), self.weights.left_out():
            hidden = cut.leave(inputs, work.hidden)
            hidden = hidden.reshape(-1, hidden.shape[-1])[positions]
            return float(np.asarray(cross_entropy(hidden, targets, weights, with_gradient=False)))

    def loss_and_gradient(self, lane: int, work: Work) -> tuple[mx.array, mx.array]:
        """The summed loss (), in nats, and its gradient by the last block's result (rows, length, d)."""
        inputs, positions, targets, weights = work.arrays
        cut, cross_entropy = self._exits[lane]

        def loss(hidden: mx.array) -> mx.array:
            hidden = cut.leave(inputs, hidden)
            hidden = hidden.reshape(-1, hidden.shape[-1])[positions]
            return cross_entropy(hidden, targets, weights, with_gradient=True)

        with packed(work.layout), self.weights.left_out():
            value, (gradient,) = self._backend.vjp(loss, [work.hidden], mx.array(1.0))
            mx.eval(value, gradient)
        return value, gradient

    def backward(self, number: int, lane: int, work: Work, *, to_input: bool) -> Gradient:
        """Computes block ``number`` again, and the gradient by its parameters and, ``to_input``, by its input.

        ``work.hidden`` is the gradient by the block's result, and becomes that by its input.
        """
        hidden = work.kept.pop(number)
        gradients = self._vjp(number, lane, work, hidden, work.hidden, to_input=to_input)[1]
        mx.eval(gradients)
        return self._gradient(number, work, gradients, hidden, to_input=to_input)

    def forward_kept(self, number: int, work: Work, *, to_input: bool) -> Work:
        """Computes block ``number``, and keeps what :meth:`backward_kept` needs. Not for a backend that is eager.

        The backward pass is made now, for a gradient whose values are not there yet: MLX computes what is asked for.
        """
        hidden = work.hidden
        slot = mx.contiguous(mx.zeros(hidden.shape, hidden.dtype))
        mx.eval(slot)
        work.hidden, gradients = self._vjp(number, 0, work, hidden, slot, to_input=to_input)
        mx.eval(work.hidden)
        work.pending[number] = slot, gradients
        return work

    def backward_kept(self, number: int, work: Work, *, to_input: bool) -> Gradient:
        """What :meth:`backward` returns, without computing block ``number`` again."""
        slot, gradients = work.pending.pop(number)
        overwrite(slot, work.hidden)
        mx.eval(gradients)
        return self._gradient(number, work, gradients, slot, to_input=to_input)

    def _vjp(
        self, number: int, lane: int, work: Work, hidden: mx.array, cotangent: mx.array, *, to_input: bool
    ) -> tuple[mx.array, list[mx.array]]:
        """Block ``number`` of ``hidden``, and ``cotangent`` times its derivatives; not computed yet."""
        assert work.entry is not None
        cut, arguments, refs = self._cuts[lane], work.entry.arguments[number], self._refs[lane][number]
        trained = refs.get()

        def block(hidden: mx.array, *values: mx.array) -> mx.array:
            refs.put(values)
            return cut.block(number, hidden, arguments)

        def by_parameters(*values: mx.array) -> mx.array:
            return block(hidden, *values)

        function, inputs = (block, [hidden, *trained]) if to_input else (by_parameters, trained)
        try:
            with packed(work.layout):
                return self._backend.vjp(function, inputs, cotangent)
        finally:
            refs.put(trained)

    def _gradient(
        self, number: int, work: Work, gradients: list[mx.array], hidden: mx.array, *, to_input: bool
    ) -> Gradient:
        work.hidden = gradients[0] if to_input else hidden
        found = zip(self.parameters_of(number), gradients[to_input:], strict=True)
        return {name: gradient.astype(mx.float32) for name, gradient in found}
