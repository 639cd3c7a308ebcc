"""The leader of a cluster that answers: what it asks the stages for, and how it goes on when a rank is lost."""

from __future__ import annotations

import logging
import secrets
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Any, Protocol

from macft.errors import MembershipChanged
from macft.evaluation.chat import Sampling, Speed
from macft.evaluation.compare import Asked, Progress, Result, measure
from macft.generation.choice import after_another_draw
from macft.generation.pipeline import AnswerPipeline, NewToken
from macft.generation.tasks import LossRows, Options
from macft.model.load import LoadedModel
from macft.run.generation.rank import DistributedModel, GenerationRank, regroup

_log = logging.getLogger("macft.generation")


class GenerationLeader:
    """The leader's side: answers of a model that is spread over all ranks. Used by one thread.

    It goes on without a rank that is lost: the others take over its blocks, and answers under way are computed again
    from their tokens.

    Args:
        rank: This process's.
        wanted: The model that answers.
        together: Most answers that are computed at the same time.
        remembered: See :class:`~macft.generation.pipeline.AnswerPipeline`.
        tell: Called with a line for the user.
    """

    def __init__(
        self,
        rank: GenerationRank,
        wanted: DistributedModel,
        *,
        together: int,
        remembered: int = 0,
        tell: Callable[[str], None],
    ):
        self._rank, self._wanted, self._tell = rank, replace(wanted, together=together), tell
        self._together, self._remembered = together, remembered
        self._stack = ExitStack()
        self._pipeline: AnswerPipeline | None = None
        self._open_steadily()

    @property
    def loaded(self) -> LoadedModel:
        """The model, of which this rank has a part of the blocks."""
        return self._rank.loaded

    @property
    def tokenizer(self) -> Any:
        """The model's."""
        return self.loaded.tokenizer

    @property
    def pipeline(self) -> AnswerPipeline:
        """Where answers are asked for; :meth:`advance` and :meth:`look` are called here, not there."""
        assert self._pipeline is not None
        return self._pipeline

    def advance(self) -> list[NewToken]:
        """As that of the pipeline; empty after a rank was lost.

        Raises:
            MacftError: the ranks that are left can't go on.
        """
        try:
            return self.pipeline.advance()
        except MembershipChanged as lost:
            self._go_on(lost)
            return []

    def look(self) -> None:
        """As that of the pipeline."""
        try:
            self.pipeline.look()
        except MembershipChanged as lost:
            self._go_on(lost)

    def close(self) -> None:
        """Ends this model's part of the ranks, which wait for another one then."""
        try:
            self.pipeline.close()
        except MembershipChanged:
            regroup(self._rank.collective, self._tell)
        self._stack.close()

    def _open(self) -> None:
        self._stack.close()
        wanted, leader = self._rank.agree(self._wanted, leads=True)
        assert wanted is not None
        opened = self._stack.enter_context(self._rank.open_stage(wanted, leader))
        if self._pipeline is None:
            self._pipeline = AnswerPipeline(
                opened.stage, opened.place, opened.channels, together=self._together, remembered=self._remembered
            )
        else:
            self._pipeline.move(opened.stage, opened.place, opened.channels)
        for line in (str(opened.layout), *opened.from_disk):
            self._tell(line)

    def _go_on(self, lost: MembershipChanged) -> None:
        self._tell(f"note: {lost}; the others go on with its blocks")
        regroup(self._rank.collective, self._tell)
        self._open_steadily()

    def _open_steadily(self) -> None:
        """Opens the stages, with those ranks that are left if some are lost meanwhile."""
        while True:
            try:
                self._open()
                return
            except MembershipChanged as lost:
                self._tell(f"note: {lost}")
                regroup(self._rank.collective, self._tell)


def dismiss(rank: GenerationRank) -> None:
    """Tells all ranks that nothing more is wanted."""
    try:
        rank.agree(None, leads=True)
    except MembershipChanged:
        _log.info("a rank was lost at the end")


class Stages(Protocol):
    """A pipeline that answers, on the rank that leads it."""

    @property
    def tokenizer(self) -> Any:
        """The model's."""
        ...

    @property
    def pipeline(self) -> AnswerPipeline:
        """Where answers are asked for."""
        ...

    def advance(self) -> list[NewToken]:
        """As that of the pipeline."""
        ...


def greedy_cluster_answers(
    answers: Stages,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    progress: Callable[[int], None],
    stopped: Callable[[], bool] = lambda: False,
) -> list[list[int]]:
    """The most likely answer to each of ``prompts``; see :class:`~macft.evaluation.answers.Answers`."""
    found: dict[int, list[int]] = {}
    stop_tokens = answers.tokenizer.eos_token_ids
    for prompt in prompts:
        found[answers.pipeline.begin(prompt, Options(), most_tokens=max_tokens, stop_tokens=stop_tokens)] = []
    done = 0
    while not (answers.pipeline.is_idle or stopped()):
        for new in answers.advance():
            if new.finish_reason != "stop" and new.outcome.token is not None:
                found[new.answer].append(new.outcome.token)
            if new.finish_reason is not None:
                done += 1
                progress(done)
    for number in found:
        answers.pipeline.end(number)
    return list(found.values())


@contextmanager
def _interrupted_afterwards() -> Iterator[None]:
    """Inside, Ctrl-C waits for the end: a message that is half received would be lost. A second one does not wait."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    is_interrupted = False

    def note(_number: int, _frame: FrameType | None) -> None:
        nonlocal is_interrupted
        if is_interrupted:
            raise KeyboardInterrupt
        is_interrupted = True

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if is_interrupted:
        raise KeyboardInterrupt


class ClusterConversation:
    """The answers of a conversation; see :class:`~macft.evaluation.chat.AnswerSource`.

    Args:
        answers: The cluster's; it remembers the last answer, if the next prompt is to go on there.
        sampling: How tokens are chosen.
        seed: Of the first answer's sampling; None: a random one.
    """

    def __init__(self, answers: GenerationLeader, sampling: Sampling, seed: int | None):
        self._answers, self._sampling = answers, sampling
        self._key = secrets.randbits(64) if seed is None else seed
        self.speed: Speed | None = None

    def reset(self) -> None:
        """A new conversation needs nothing: what prompts have in common is found by their tokens."""

    def stream(self, prompt: list[int]) -> Generator[str]:
        """See :class:`~macft.evaluation.chat.AnswerSource`."""
        answers, pipeline = self._answers, self._answers.pipeline
        detokenizer = answers.tokenizer.detokenizer
        started = time.perf_counter()
        number = pipeline.begin(
            prompt,
            Options(self._sampling, self._key),
            most_tokens=self._sampling.max_tokens,
            stop_tokens=answers.tokenizer.eos_token_ids,
        )
        prompt_tokens, count, prompt_seconds = len(prompt) - pipeline.reused(number), 0, 0.0
        try:
            is_over = False
            while not is_over:
                with _interrupted_afterwards():
                    arrived = answers.advance()
                for new in arrived:
                    count += 1
                    self._key = new.outcome.key
                    if count == 1:
                        prompt_seconds, started = time.perf_counter() - started, time.perf_counter()
                    is_over = new.finish_reason is not None
                    if new.finish_reason != "stop":
                        detokenizer.add_token(new.outcome.token)
                    if is_over:
                        detokenizer.finalize()
                    seconds = max(time.perf_counter() - started, 1e-9)
                    self.speed = Speed(prompt_tokens, prompt_tokens / prompt_seconds, count, count / seconds)
                    yield detokenizer.last_segment
        finally:
            pipeline.end(number)
            self._key = after_another_draw(self._key, self._sampling, answers.tokenizer)


class ClusterLosses:
    """The losses of rows by the stages of ``answers``; see :class:`~macft.training.validation.Losses`."""

    def __init__(self, answers: GenerationLeader):
        self._answers = answers

    def of_batches(
        self, batches: Iterable[Sequence[Any]], stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[list[float]]:
        """The loss of each part of each of ``batches``, padded ones, in nats."""
        pipeline = self._answers.pipeline
        waiting: list[dict[int, float]] = []
        sizes: list[int] = []
        for parts in batches:
            if stopped():
                break
            found: dict[int, float] = {}
            waiting.append(found)
            sizes.append(len(parts))
            for number, part in enumerate(parts):
                arrays = (part.inputs, part.positions, part.targets, part.weights)
                rows = LossRows(*(array.tolist() for array in arrays))
                pipeline.loss(rows, partial(found.__setitem__, number))
            while len(waiting) > 2 * pipeline.capacity:
                yield self._finished(waiting, sizes)
        while waiting:
            yield self._finished(waiting, sizes)

    def _finished(self, waiting: list[dict[int, float]], sizes: list[int]) -> list[float]:
        """The losses of the oldest batch."""
        while len(waiting[0]) < sizes[0]:
            self._answers.advance()
        found = waiting.pop(0)
        return [found[number] for number in range(sizes.pop(0))]


def evaluate_distributed(answers: GenerationLeader, asked: Asked, progress: Progress) -> Result:
    """The results of the model that is spread over all ranks; see :func:`~macft.evaluation.compare.evaluate`.

    Each row is a task of its own, so that all stages compute.
    """
    execution = replace(answers.loaded.execution.padded(), evaluation_rows=1, lanes=1)
    answers_to = partial(greedy_cluster_answers, answers)
    return measure(ClusterLosses(answers), answers_to, answers.loaded, execution, asked, progress)
