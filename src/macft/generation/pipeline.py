"""Many answers at once through the stages of a pipeline.

The rank of the first stage decides what is computed. It gives task after task to the stages, each of which computes
tasks in the order in which they come; so outcomes come back in that order, too. A token is asked for when the one
before has come back; chunks of a prompt follow each other without waiting. While a task is in one stage, other tasks
are in the others: with as many answers as stages all of them compute.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count

from macft.collective.base import Channels
from macft.errors import ProtocolError
from macft.generation.stage import AnsweringStage
from macft.generation.tasks import (
    LossRows,
    Options,
    Outcome,
    Task,
    TaskKind,
    pack_outcome,
    pack_task,
    unpack_outcome,
    unpack_task,
)
from macft.parallel.stage_places import StagePlace

PROMPT_TOKENS = 512
"""Most tokens of a prompt in a task."""
_TASKS_PER_STAGE = 2


PURPOSE = "answers"
"""Of the channels between stages that answer."""


def channel_pairs(place: StagePlace) -> list[tuple[int, int]]:
    """The ranks of the pipeline that exchange messages: neighbours, and the last one with the first one."""
    ranks = [stage.rank for stage in place.stages]
    around = zip(ranks, (*ranks[1:], ranks[0]), strict=True)
    return sorted({(min(pair), max(pair)) for pair in around if pair[0] != pair[1]})


@dataclass(frozen=True)
class NewToken:
    """A token of an answer, or the end of one.

    Attributes:
        answer: Its number.
        outcome: The token, and what is known of it.
        finish_reason: ``stop`` for a token that ends an answer and is no part of it, ``length`` for the last one of an
            answer that may have no more; None if more follow.
    """

    answer: int
    outcome: Outcome
    finish_reason: str | None


@dataclass(eq=False)
class _Answer:
    """An answer under way: ``tokens`` are those of its prompt and those chosen so far.

    ``options`` have the random key as the last draw left it. The first ``computed`` tokens have been given to the
    stages, which ``forget`` as many of those that came with an earlier answer.
    """

    tokens: list[int]
    prompt_tokens: int
    options: Options
    most_tokens: int
    stop_tokens: frozenset[int]
    computed: int = 0
    is_known: bool = False
    forget: int = 0

    def start_again(self) -> None:
        """The stages have lost what they kept of it."""
        self.computed, self.is_known, self.forget = 0, False, 0


@dataclass(frozen=True)
class _Loss:
    rows: LossRows
    finished: Callable[[float], None]


@dataclass(frozen=True)
class _OnItsWay:
    """What the outcome of a task is for: the next token of ``answer``, a ``loss``, or nothing."""

    number: int = 0
    answer: _Answer | None = None
    loss: _Loss | None = None


class AnswerPipeline:
    """Gives tasks to the stages and takes their outcomes. Used by one thread, on the rank of the first stage.

    Args:
        stage: This rank's.
        place: Its place.
        channels: To the other stages; unused where this rank has all blocks.
        together: Most answers that are computed at the same time; others wait.
        remembered: Answers that are over whose keys and values are kept, for prompts that begin with the same tokens.
    """

    def __init__(
        self, stage: AnsweringStage, place: StagePlace, channels: Channels, *, together: int, remembered: int = 0
    ):
        self._stage, self._place, self._channels = stage, place, channels
        self._together, self._remembered = together, remembered
        self._numbers = count(1)
        self._sent, self._received = count(), count()
        self._answers: dict[int, _Answer] = {}
        self._ready: deque[int] = deque()
        self._waiting: deque[int] = deque()
        self._losses: deque[_Loss] = deque()
        self._on_their_way: deque[_OnItsWay] = deque()
        self._outcomes: deque[Outcome] = deque()
        # Of answers that are over, the tokens that the stages keep; the oldest first.
        self._kept: dict[int, list[int]] = {}
        self._ended: list[int] = []
        self._new: list[NewToken] = []

    @property
    def _last(self) -> int:
        """The rank of the last stage, which chooses tokens."""
        return self._place.stages[-1].rank

    @property
    def is_idle(self) -> bool:
        """Whether nothing is to be computed."""
        return not (self._on_their_way or self._ready or self._losses)

    @property
    def capacity(self) -> int:
        """Most tasks on their way: enough for every stage to have one while others are handed on."""
        return _TASKS_PER_STAGE * len(self._place.stages)

    def begin(self, prompt: Sequence[int], options: Options, *, most_tokens: int, stop_tokens: Iterable[int]) -> int:
        """Asks for an answer to ``prompt``, which is not empty; returns its number.

        Args:
            prompt: Tokens.
            options: How tokens are chosen.
            most_tokens: Of the answer; -1 for no limit.
            stop_tokens: Those that end it.
        """
        answer = _Answer(list(prompt), len(prompt), options, most_tokens, frozenset(stop_tokens))
        number = self._with_kept_beginning(answer) or next(self._numbers)
        self._answers[number] = answer
        active = len(self._answers) - len(self._waiting)
        (self._ready if active <= self._together else self._waiting).append(number)
        return number

    def reused(self, number: int) -> int:
        """How many tokens of the prompt of answer ``number``, which has just begun, need not be computed."""
        return self._answers[number].computed

    def end(self, number: int) -> None:
        """No more of this answer is asked for. An answer that has ended by itself needs no such call."""
        answer = self._answers.pop(number, None)
        if answer is None:
            return
        for queue in (self._ready, self._waiting):
            if number in queue:
                queue.remove(number)
        if answer.is_known:
            self._kept[number] = answer.tokens[: answer.computed]
        while len(self._kept) > self._remembered:
            oldest = next(iter(self._kept))
            del self._kept[oldest]
            self._ended.append(oldest)
        if self._waiting and len(self._answers) - len(self._waiting) < self._together:
            self._ready.append(self._waiting.popleft())

    def loss(self, rows: LossRows, finished: Callable[[float], None]) -> None:
        """Asks for the loss of ``rows``; ``finished`` is called with it, in nats, during a later :meth:`advance`."""
        self._losses.append(_Loss(rows, finished))

    def advance(self) -> list[NewToken]:
        """Gives the stages what there is to compute, waits for the oldest task, and returns the tokens that it brought.

        Raises:
            MacftError: a stage failed, or its rank is gone.
        """
        while len(self._on_their_way) < self.capacity and (self._ready or self._losses):
            if self._losses:
                loss = self._losses.popleft()
                self._give(Task(TaskKind.LOSS, rows=loss.rows), _OnItsWay(loss=loss))
            else:
                self._give_tokens(self._ready.popleft())
        if self._on_their_way:
            self._take()
        new, self._new = self._new, []
        return new

    def look(self) -> None:
        """Shows the other ranks that this one is alive, and this one that they are. Raises as :meth:`advance`."""
        self._give(Task(TaskKind.NOTHING), _OnItsWay())
        while self._on_their_way:
            self._take()

    def close(self) -> None:
        """Tells the stages that nothing more will come. Raises as :meth:`advance`."""
        self._give(Task(TaskKind.END), _OnItsWay())
        while self._on_their_way:
            self._take()

    def move(self, stage: AnsweringStage, place: StagePlace, channels: Channels) -> None:
        """Goes on with other stages, which compute again what the former ones kept of the answers."""
        self._stage, self._place, self._channels = stage, place, channels
        self._sent, self._received = count(), count()
        self._losses.extendleft(task.loss for task in reversed(self._on_their_way) if task.loss is not None)
        self._on_their_way.clear()
        self._outcomes.clear()
        self._kept.clear()
        self._ended.clear()
        self._ready = deque(number for number in self._answers if number not in self._waiting)
        for answer in self._answers.values():
            answer.start_again()

    def _with_kept_beginning(self, answer: _Answer) -> int | None:
        """The answer that is over with most of the tokens of this one's prompt, which goes on where they part."""
        same = {number: _alike(kept, answer.tokens[:-1]) for number, kept in self._kept.items()}
        number = max(same, key=lambda number: same[number], default=None)
        if number is None or 2 * same[number] < min(len(self._kept[number]), len(answer.tokens)):
            return None
        if same[number] < len(self._kept[number]) and not self._stage.can_forget(number):
            return None
        answer.forget, answer.computed = len(self._kept.pop(number)) - same[number], same[number]
        return number

    def _give_tokens(self, number: int) -> None:
        answer = self._answers[number]
        # As mlx-lm does, the last token of a prompt is computed by itself.
        left = len(answer.tokens) - answer.computed
        size = 1 if left == 1 else min(left - 1, PROMPT_TOKENS)
        tokens = answer.tokens[answer.computed : answer.computed + size]
        options = None if answer.is_known else answer.options
        task = Task(TaskKind.TOKENS, number, tuple(tokens), options, chooses=left == 1, forget=answer.forget)
        answer.computed += size
        answer.is_known, answer.forget = True, 0
        if not task.chooses:
            self._ready.append(number)
        self._give(task, _OnItsWay(number, answer if task.chooses else None))

    def _give(self, task: Task, on_its_way: _OnItsWay) -> None:
        task = replace(task, ended=tuple(self._ended))
        self._ended.clear()
        self._on_their_way.append(on_its_way)
        sequence = next(self._sent)
        made = self._stage.compute(task, None)
        if isinstance(made, Outcome):
            self._outcomes.append(made)
        elif self._place.after is not None:
            self._channels.send(self._place.after, sequence, pack_task(task, made))

    def _take(self) -> None:
        sequence = next(self._received)
        if self._outcomes:
            outcome = self._outcomes.popleft()
        else:
            outcome = unpack_outcome(self._channels.receive(self._last, sequence))
        task = self._on_their_way.popleft()
        if task.loss is not None:
            task.loss.finished(outcome.loss)
        elif task.answer is not None and self._answers.get(task.number) is task.answer:
            self._note(task.number, task.answer, outcome)

    def _note(self, number: int, answer: _Answer, outcome: Outcome) -> None:
        if outcome.token is None:
            raise ProtocolError(f"rank {self._last} chose no token; do all ranks run the same macft?")
        answer.options = replace(answer.options, key=outcome.key)
        reason: str | None = None
        if outcome.token in answer.stop_tokens:
            reason = "stop"
        else:
            answer.tokens.append(outcome.token)
            if len(answer.tokens) - answer.prompt_tokens == answer.most_tokens:
                reason = "length"
        if reason is None:
            self._ready.append(number)
        else:
            self.end(number)
        self._new.append(NewToken(number, outcome, reason))


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((number for number, (mine, its) in pairs if mine != its), min(len(one), len(other)))


def follow(stage: AnsweringStage, place: StagePlace, channels: Channels) -> None:
    """Computes this rank's stage of each task until the last one; for all ranks but that of the first stage.

    Raises:
        MacftError: a stage failed, or its rank is gone.
    """
    for sequence in count():
        assert place.before is not None
        task, hidden = unpack_task(channels.receive(place.before, sequence))
        made = stage.compute(task, hidden)
        if isinstance(made, Outcome):
            channels.send(place.stages[0].rank, sequence, pack_outcome(made))
        elif place.after is not None:
            channels.send(place.after, sequence, pack_task(task, made))
        if task.kind is TaskKind.END:
            return
