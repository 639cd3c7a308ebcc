"""Generates a server's answers by a model that is spread over a cluster."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from queue import Empty, Queue
from typing import Any, Protocol

from mlx_lm.server import GenerationContext, Response

from macft.errors import MacftError
from macft.evaluation.chat import Sampling
from macft.generation.pipeline import AnswerPipeline, NewToken
from macft.generation.tasks import Options
from macft.model.load import LoadedModel
from macft.serving.engine import Engine
from macft.serving.options import ServerConfig

_WAIT_SECONDS = 0.05
_LOOK_SECONDS = 2.0
"""How often an idle cluster is looked at: it would take a silent leader for lost."""


class SpreadAnswers(Protocol):
    """The cluster's answers; see :class:`~macft.run.generation.leader.GenerationLeader`."""

    @property
    def loaded(self) -> LoadedModel:
        """The model, of which this process has a part of the blocks."""
        ...

    @property
    def pipeline(self) -> AnswerPipeline:
        """Where answers are asked for."""
        ...

    def advance(self) -> list[NewToken]:
        """Computes on, and returns new tokens."""
        ...

    def look(self) -> None:
        """Shows all machines that the others are there."""
        ...


@dataclass
class _Response:
    """A response under way."""

    queue: Queue[Any]
    context: Any
    detokenizer: Any
    stop: Any


class ClusterEngine(Engine):
    """Generates over a cluster, all answers at the same time.

    Args:
        opened: Starts the cluster; entered and left by the thread that uses it.
        config: Of the server.
    """

    def __init__(self, opened: AbstractContextManager[SpreadAnswers], config: ServerConfig):
        self._opened = opened
        self._responses: dict[int, _Response] = {}
        super().__init__(config)

    @contextmanager
    def answering(self) -> Iterator[Callable[[], None]]:
        """See :class:`~macft.serving.engine.Engine`."""
        with self._opened as answers:
            self.model_provider.hold(answers.loaded)
            yield lambda: self._run(answers)

    def _run(self, answers: SpreadAnswers) -> None:
        looked = time.monotonic()
        try:
            while not self._stop:
                self._accept(answers.pipeline)
                for number in [n for n, each in self._responses.items() if each.context._should_stop]:
                    answers.pipeline.end(number)
                    del self._responses[number]
                if not answers.pipeline.is_idle:
                    for new in answers.advance():
                        self._hand_on(answers.pipeline, new)
                    looked = time.monotonic()
                elif time.monotonic() - looked > _LOOK_SECONDS:
                    answers.look()
                    looked = time.monotonic()
        except MacftError as error:
            for response in self._responses.values():
                response.queue.put(error)
            raise

    def _accept(self, pipeline: AnswerPipeline) -> None:
        """Begins to answer new requests; waits a little for one where there is nothing else to do."""
        while True:
            try:
                queue, request, arguments = self.requests.get(timeout=_WAIT_SECONDS if pipeline.is_idle else 0)
            except Empty:
                return
            try:
                self._begin(pipeline, queue, request, arguments)
            except MacftError as error:  # the prompt can't be made
                queue.put(error)

    def _begin(self, pipeline: AnswerPipeline, queue: Queue[Any], request: Any, arguments: Any) -> None:
        tokenizer = self.model_provider.tokenizer
        prompt, _, _, state, _ = self._tokenize(tokenizer, request, arguments)
        stop, text_states = self._make_state_machine(self.model_provider.model_key, tokenizer, arguments.stop_words)
        number = pipeline.begin(
            prompt, _options(arguments), most_tokens=arguments.max_tokens, stop_tokens=tokenizer.eos_token_ids
        )
        context = GenerationContext(
            has_tool_calling=tokenizer.has_tool_calling,
            has_thinking=tokenizer.has_thinking,
            tool_parser=tokenizer.tool_parser,
            text_sm=text_states,
            initial_state=state,
            prompt=prompt,
            prompt_cache_count=pipeline.reused(number),
        )
        self._responses[number] = _Response(queue, context, tokenizer.detokenizer, stop.matcher())
        queue.put(context)

    def _hand_on(self, pipeline: AnswerPipeline, new: NewToken) -> None:
        response = self._responses.get(new.answer)
        if response is None:
            return
        outcome, reason, detokenizer = new.outcome, new.finish_reason, response.detokenizer
        if response.stop.advance(outcome.token):
            reason = "stop"
        if reason != "stop":
            detokenizer.add_token(outcome.token)
        if reason is not None:
            detokenizer.finalize()
        tokenizer = self.model_provider.tokenizer
        top = tuple(
            {"id": token, "token": tokenizer.convert_ids_to_tokens(token), "logprob": logprob}
            for token, logprob in outcome.top
        )
        response.queue.put(Response(detokenizer.last_segment, outcome.token, outcome.logprob, reason, top))
        if reason is not None:
            response.queue.put(None)
            pipeline.end(new.answer)
            del self._responses[new.answer]


def _options(arguments: Any) -> Options:
    sampling, logits = arguments.sampling, arguments.logits
    return Options(
        sampling=Sampling(
            temp=sampling.temperature,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            top_k=sampling.top_k,
            xtc_probability=sampling.xtc_probability,
            xtc_threshold=sampling.xtc_threshold,
        ),
        key=secrets.randbits(64) if arguments.seed is None else arguments.seed % 2**64,
        penalties={
            f"{kind}_{what}": getattr(logits, f"{kind}_{what}")
            for kind in ("repetition", "presence", "frequency")
            for what in ("penalty", "context_size")
        },
        logit_bias=tuple((logits.logit_bias or {}).items()),
        top=max(0, arguments.top_logprobs),
    )
