"""Generates the answers of a server: mlx-lm's own queue and batches, with a model that macft has loaded."""

from __future__ import annotations

import threading
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache
from mlx_lm.server import ModelProvider, ResponseGenerator

from macft.data.conversation import Conversation
from macft.data.template import template_tokens
from macft.data.tokenize import text_tokens
from macft.errors import DataError, MacftError, ModelError
from macft.evaluation.batched import takes_batches
from macft.model.files.vocabulary import vocabulary_of
from macft.model.load import LoadedModel
from macft.serving.options import ServerConfig

_STOP_SECONDS = 1.0
_PREFILL_TOKENS = 2048
_CACHED_CONVERSATIONS = 10
# Of lengths that differ, with little to compute.
_TRIAL_TEXTS = ("Hello", "What is the capital of France?", "Name a colour.")

OpenedModel = AbstractContextManager[LoadedModel]
"""Holds a model that is ready to compute; entered and left by the thread that uses it."""


class Provider(ModelProvider):
    """mlx-lm's holder of models, with the one model of this server, whatever a request asks for."""

    def __init__(self, config: ServerConfig):
        super().__init__(_mlx_lm_arguments(config))
        self.max_positions: int | None = None
        self.vocabulary = 0

    def hold(self, loaded: LoadedModel) -> None:
        """Has requests answered by ``loaded``."""
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.model_key = (str(loaded.path), None, None)
        self.max_positions = _max_positions(loaded.config)
        self.vocabulary = vocabulary_of(loaded.path) or len(loaded.tokenizer)

    def load(self, *_: Any) -> tuple[Any, Any]:
        """The model and its tokenizer."""
        return self.model, self.tokenizer

    def load_default(self) -> None:
        """Nothing: it is loaded."""


class Engine(ResponseGenerator):
    """mlx-lm's generator of responses, with macft's prompts. A subclass says what generates.

    Raises:
        MacftError: the model can't be loaded.
    """

    def __init__(self, config: ServerConfig):
        self.failure: BaseException | None = None
        """Why it can't go on."""
        self.on_failure: Callable[[], None] = lambda: None
        """Called in its thread when it can't go on."""
        self._ready = threading.Event()
        self._contexts: dict[int, Any] = {}
        super().__init__(Provider(config), LRUPromptCache(_CACHED_CONVERSATIONS))
        self._ready.wait()
        if self.failure is not None:
            self._generation_thread.join()
            raise self.failure

    def answering(self) -> AbstractContextManager[Callable[[], None]]:
        """Inside, the model is there; gives what generates until ``_stop`` is set. Entered in the engine's thread."""
        raise NotImplementedError

    def generate(
        self, request: Any, arguments: Any, progress_callback: Callable[[int, int], None] | None = None
    ) -> tuple[Any, Iterator[Any]]:
        """As mlx-lm's; an answer that is still generated when the server stops ends at its next token."""
        context, responses = super().generate(request, arguments, progress_callback)
        if self._stop:
            context.stop()

        def followed() -> Iterator[Any]:
            self._contexts[id(context)] = context
            try:
                yield from responses
            finally:
                del self._contexts[id(context)]

        return context, followed()

    def stop(self) -> None:
        """Ends all answers, and the thread that generates, for which it waits a second at most."""
        self._stop = True
        for context in list(self._contexts.values()):
            context.stop()
        self._generation_thread.join(_STOP_SECONDS)

    def _generate(self) -> None:
        try:
            with self.answering() as run:
                self._ready.set()
                run()
        except BaseException as error:
            self.failure, self._generation_failed = error, True
            if self._ready.is_set():
                self.on_failure()
        finally:
            self._ready.set()

    def _tokenize(self, tokenizer: Any, request: Any, arguments: Any) -> Any:
        """As mlx-lm's, with the tokens that training and ``macft generate`` give the model for the same messages."""
        if request.request_type != "chat":
            prompt = text_tokens(request.prompt, tokenizer)
            return self._checked(prompt), [prompt], ["assistant"], "normal", None
        if arguments.chat_template_kwargs or not tokenizer.has_chat_template:
            try:
                tokenized = super()._tokenize(tokenizer, request, arguments)
            except Exception as error:  # a template is the model's own code and may raise anything
                raise DataError(f"the model's chat template refuses it: {' '.join(str(error).split())}") from error
            self._checked(tokenized[0])
            return tokenized
        prompt = template_tokens(Conversation(request.messages, request.tools), tokenizer, opens_answer=True)
        is_thinking = tokenizer.has_thinking and tokenizer.rfind_think_start(prompt) > tokenizer.rfind_think_end(prompt)
        state = tokenizer.response_initial_state or ("reasoning" if is_thinking else "normal")
        return self._checked(prompt), [prompt], ["assistant"], state, None

    def _checked(self, prompt: list[int]) -> list[int]:
        limit = self.model_provider.max_positions
        if not prompt:
            raise DataError("the prompt has no tokens")
        if limit is not None and len(prompt) > limit:
            raise DataError(f"the prompt has {len(prompt)} tokens, and the model takes {limit}")
        return prompt


class OwnEngine(Engine):
    """Generates in this process, several answers in a batch where the model gets that right."""

    def __init__(self, opened: OpenedModel, config: ServerConfig):
        self._opened = opened
        super().__init__(config)

    @contextmanager
    def answering(self) -> Iterator[Callable[[], None]]:
        """See :class:`Engine`."""
        with self._opened as loaded:
            provider = self.model_provider
            provider.hold(loaded)
            can_merge = all(hasattr(cache, "merge") for cache in make_prompt_cache(loaded.model))
            trials = [text_tokens(text, loaded.tokenizer) for text in _TRIAL_TEXTS]
            provider.is_batchable = can_merge and takes_batches(loaded.model, loaded.tokenizer, trials)
            yield partial(ResponseGenerator._generate, self)


def status_of(error: Exception) -> int:
    """The HTTP status for an ``error`` of :class:`Engine`."""
    if isinstance(error, ModelError):
        return 500
    return 400 if isinstance(error, MacftError | ValueError) else 500


def _max_positions(config: dict[str, Any]) -> int | None:
    value = config.get("max_position_embeddings")
    return value if isinstance(value, int) and value > 0 else None


def _mlx_lm_arguments(config: ServerConfig) -> Namespace:
    """What ``mlx_lm.server`` would have been started with."""
    sampling = config.sampling
    return Namespace(
        model=config.name,
        adapter_path=None,
        draft_model=None,
        num_draft_tokens=0,
        pipeline=False,
        trust_remote_code=False,
        chat_template="",
        chat_template_args={},
        use_default_chat_template=False,
        allowed_origins=list(config.allowed_origins),
        max_tokens=sampling.max_tokens,
        temp=sampling.temp,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        decode_concurrency=config.together,
        prompt_concurrency=min(8, config.together),
        prefill_step_size=_PREFILL_TOKENS,
        prompt_cache_size=_CACHED_CONVERSATIONS,
        prompt_cache_bytes=None,
        kv_bits=None,
        kv_group_size=64,
        quantized_kv_start=0,
    )
