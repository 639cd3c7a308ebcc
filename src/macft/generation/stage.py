"""One rank's blocks of a model that answers, with a cache of keys and values for each answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from macft.errors import ModelError
from macft.generation.choice import TokenChoice
from macft.generation.tasks import LossRows, Outcome, Task, TaskKind
from macft.model.backends.base import Backend, CrossEntropy
from macft.model.blocks.cut_model import Arguments, CutModel
from macft.model.blocks.ends import ends_of
from macft.model.head import split_head
from macft.model.load import LoadedModel

_PROBE = (1, 2, 3, 4)


class _Kept:
    """What a stage keeps of one answer."""

    def __init__(self, loaded: LoadedModel, choice: TokenChoice, max_kv_size: int | None):
        self.caches: list[Any] = make_prompt_cache(loaded.model, max_kv_size)
        self.cut = CutModel(loaded.model, partial(loaded.model, cache=self.caches))
        self.choice = choice


class AnsweringStage:
    """The blocks ``blocks`` of ``loaded``, whose model is installed in ``backend``.

    The first stage also embeds tokens, and the last one computes logits and chooses tokens. What other stages compute
    is neither computed nor read.

    Raises:
        ModelError: the model can't be computed in parts.
    """

    def __init__(self, loaded: LoadedModel, backend: Backend, blocks: range):
        self._loaded, self._backend, self._blocks = loaded, backend, blocks
        self.is_first, self.is_last = blocks.start == 0, blocks.stop == len(loaded.model.layers)
        ends = ends_of(is_first=self.is_first, is_last=self.is_last)
        self._answers: dict[int, _Kept] = {}
        loaded.model.eval()
        if loaded.streamed is not None:
            loaded.streamed.ends = ends
        with self._nothing_else_is_read():
            self._whole = CutModel(loaded.model)
            self._loss: CrossEntropy | None = None
            if self.is_last:
                with CutModel(loaded.model).skipped():
                    parts = split_head(loaded.model)
                self._whole = CutModel(loaded.model, parts[0] if parts else None)
                self._loss = backend.cross_entropy(parts[1] if parts else None)
            obstacle = CutModel(loaded.model).obstacle(mx.array([_PROBE]), blocks, self._weights_of, ends)
        if obstacle is not None:
            raise ModelError(f"{loaded.path}: this model can't be spread over several nodes: {obstacle}")

    def compute(self, task: Task, hidden: mx.array | None) -> mx.array | Outcome | None:
        """This stage's part of ``task``: the hidden states for the next stage, or what is the outcome of all.

        ``hidden`` (rows, length, d) is the result of the stage before; None on the first.

        Raises:
            ModelError: a block's weights can't be read.
        """
        for answer in task.ended:
            self._answers.pop(answer, None)
        with self._nothing_else_is_read():
            if task.kind is TaskKind.TOKENS:
                return self._tokens(task, hidden)
            if task.kind is TaskKind.LOSS and task.rows is not None:
                return self._losses(task.rows, hidden)
        return Outcome() if self.is_last else None

    def can_forget(self, answer: int) -> bool:
        """Whether the newest tokens of what is kept of ``answer`` can be taken back. The same on all stages."""
        return bool(can_trim_prompt_cache(self._answers[answer].caches))

    def _tokens(self, task: Task, hidden: mx.array | None) -> mx.array | Outcome:
        answer = self._answer_of(task)
        if task.forget:
            trim_prompt_cache(answer.caches, task.forget)
        answer.choice.note(task.tokens, task.forget)
        inputs = mx.array([task.tokens])
        entry = answer.cut.enter(inputs)
        hidden = entry.hidden if hidden is None else hidden
        for number, arguments in enumerate(entry.arguments):
            if number in self._blocks:
                with self._weights_of(number):
                    hidden = answer.cut.block(number, hidden, arguments)
                    if not self._stays(number):
                        mx.eval(hidden, _state(arguments))
            else:
                _pass_by(arguments, len(task.tokens))
        own = [_state(entry.arguments[number]) for number in self._blocks]
        if self.is_last and task.chooses:
            logits = answer.cut.leave(inputs, hidden)[:, -1, :]
            mx.eval(logits, own)
            return answer.choice.choose(logits)
        mx.eval(hidden, own)
        return Outcome() if self.is_last else hidden

    def _losses(self, rows: LossRows, hidden: mx.array | None) -> mx.array | Outcome:
        inputs = mx.array(rows.inputs)
        entry = self._whole.enter(inputs)
        hidden = entry.hidden if hidden is None else hidden
        for number in self._blocks:
            with self._weights_of(number):
                hidden = self._whole.block(number, hidden, entry.arguments[number])
                mx.eval(hidden)
        if self._loss is None:
            return hidden
        hidden = self._whole.leave(inputs, hidden)
        hidden = hidden.reshape(-1, hidden.shape[-1])[mx.array(rows.positions)]
        loss = self._loss(hidden, mx.array(rows.targets), mx.array(rows.weights), with_gradient=False)
        return Outcome(loss=float(np.asarray(loss)))

    def _answer_of(self, task: Task) -> _Kept:
        if task.options is not None:
            kept = self._answers.get(task.answer)
            choice = TokenChoice(task.options, self._loaded.tokenizer, kept.choice if kept else None)
            if kept is None:
                self._answers[task.answer] = _Kept(self._loaded, choice, task.options.sampling.max_kv_size)
            else:
                kept.choice = choice
        return self._answers[task.answer]

    def _nothing_else_is_read(self) -> AbstractContextManager[None]:
        """Inside, the model's code reads nothing by itself: embedding and head of other stages are not computed."""
        weights = self._loaded.streamed
        return nullcontext() if weights is None else weights.left_out()

    @contextmanager
    def _weights_of(self, number: int) -> Iterator[None]:
        """Inside, block ``number`` has its weights; the next one of this stage that needs it is read meanwhile."""
        weights = self._loaded.streamed
        if weights is None:
            yield
            return
        following = [*range(number + 1, self._blocks.stop), *range(self._blocks.start, number)]
        with weights.held(number, then=following):
            yield

    def _stays(self, number: int) -> bool:
        return self._loaded.streamed is None or number in self._loaded.streamed.resident


def _caches(arguments: Arguments) -> list[Any]:
    """The caches that a block is given, those inside of others included."""
    found: list[Any] = []
    for value in (*arguments.positional, *arguments.named.values()):
        found += [value, *getattr(value, "caches", ())] if hasattr(value, "__dict__") else []
    return found


def _state(arguments: Arguments) -> list[mx.array]:
    values = [value for cache in _caches(arguments) for value in vars(cache).values()]
    return [value for _, value in tree_flatten(values) if isinstance(value, mx.array)]


def _pass_by(arguments: Arguments, count: int) -> None:
    """Has the caches of another stage's block count ``count`` more tokens: masks and positions may be made by them."""
    for cache in _caches(arguments):
        if type(cache) is KVCache:
            cache.offset += count
        elif hasattr(cache, "update_and_fetch") and not hasattr(cache, "caches"):
            nothing = mx.zeros((1, 1, count, 1))
            mx.eval(cache.update_and_fetch(nothing, nothing))
