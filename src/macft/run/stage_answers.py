"""Answers by the stages of a run that is a pipeline: no node reads the blocks of another."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from macft.collective.base import Channels
from macft.generation.pipeline import AnswerPipeline, NewToken, channel_pairs, follow
from macft.generation.stage import AnsweringStage
from macft.parallel.stage_places import StagePlace
from macft.run.cluster_answers import greedy_cluster_answers
from macft.run.prepare import Run

_PURPOSE = "answers"


class _Stages:
    """A pipeline of the run, on the rank of its first stage."""

    def __init__(self, stage: AnsweringStage, place: StagePlace, channels: Channels, tokenizer: Any):
        self.pipeline = AnswerPipeline(stage, place, channels, together=len(place.stages))
        self.tokenizer = tokenizer

    def advance(self) -> list[NewToken]:
        return self.pipeline.advance()


class StageAnswers:
    """Greedy answers of the model that is trained; see :class:`~macft.evaluation.answers.Answers`.

    The first stage of each pipeline asks, and the others compute for it: the ``questions`` of their ranks are none. A
    call is one of all ranks.

    Args:
        run: A pipeline.
        seconds: Answers stop there; infinite for those that are scored.
    """

    def __init__(self, run: Run, seconds: float = math.inf):
        self._run, self._seconds = run, seconds
        self._places = run.trainer.nodes.places

    def questions(self, count: int) -> range:
        """Which of ``count`` questions this rank asks."""
        layout = self._places.layout
        place = layout.place_of(self._run.collective.rank)
        return range(0) if place is None or place[1] > 0 else range(place[0], count, len(layout.pipelines))

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        progress: Callable[[int], None],
        stopped: Callable[[], bool],
    ) -> list[list[int]]:
        """See :class:`~macft.evaluation.answers.Answers`.

        Raises:
            MacftError: a stage failed, or its rank is gone.
        """
        run, deadline = self._run, time.monotonic() + self._seconds
        pairs = [pair for stages in self._places.layout.pipelines for pair in channel_pairs(StagePlace(0, stages))]
        channels, place = run.collective.open_channels(pairs, _PURPOSE), self._places.own
        if place is None:
            return []
        stage = AnsweringStage(run.loaded, run.backend, place.stage.blocks)
        if place.before is not None:
            follow(stage, place, channels)
            return []
        stages = _Stages(stage, place, channels, run.loaded.tokenizer)
        found = greedy_cluster_answers(
            stages,
            prompts,
            max_tokens=max_tokens,
            progress=progress,
            stopped=lambda: stopped() or time.monotonic() > deadline,
        )
        stages.pipeline.close()
        return found
