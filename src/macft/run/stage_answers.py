"""Answers by the stages of a run that is a pipeline: no node reads the blocks of another."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from macft.collective.base import Channels, Collective
from macft.generation.pipeline import PURPOSE, AnswerPipeline, NewToken, channel_pairs, follow
from macft.generation.stage import AnsweringStage
from macft.model.backends.base import Backend
from macft.model.load import LoadedModel
from macft.parallel.stage_places import StagePlace, StagePlaces
from macft.run.generation.leader import greedy_cluster_answers


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
        loaded: The model, whose blocks are supplied one by one.
        backend: In which it is installed.
        places: The stages of the ranks of ``collective``.
        collective: All ranks.
        seconds: Answers stop there; infinite for those that are scored.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        backend: Backend,
        places: StagePlaces,
        collective: Collective,
        seconds: float = math.inf,
    ):
        self._loaded, self._backend = loaded, backend
        self._places, self._collective, self._seconds = places, collective, seconds

    def questions(self, count: int) -> range:
        """Which of ``count`` questions this rank asks."""
        layout = self._places.layout
        place = layout.place_of(self._collective.rank)
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
        deadline = time.monotonic() + self._seconds
        pairs = [pair for stages in self._places.layout.pipelines for pair in channel_pairs(StagePlace(0, stages))]
        channels, place = self._collective.open_channels(pairs, PURPOSE), self._places.own
        if place is None:
            return []
        stage = AnsweringStage(self._loaded, self._backend, place.stage.blocks)
        if place.before is not None:
            follow(stage, place, channels)
            return []
        stages = _Stages(stage, place, channels, self._loaded.tokenizer)
        found = greedy_cluster_answers(
            stages,
            prompts,
            max_tokens=max_tokens,
            progress=progress,
            stopped=lambda: stopped() or time.monotonic() > deadline,
        )
        stages.pipeline.close()
        return found
