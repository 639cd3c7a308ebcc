"""A model that answers, from Python: what ``macft generate`` uses."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from macft.errors import ConfigError
from macft.run.tuned_model import TunedModel

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from macft.evaluation.chat import Chat
    from macft.model.load import LoadedModel


class Model:
    """A base model, usually with an adapter, in memory.

    ``with macft.load(folder) as model:`` gives its memory back at the end; so does :meth:`close`.
    """

    def __init__(self, loaded: LoadedModel):
        from macft.model.backends.choose import make_backend

        self._loaded = loaded
        self._installed = ExitStack()
        self._installed.enter_context(make_backend(loaded.execution.padded()).installed(loaded.model))

    @property
    def model(self) -> nn.Module:
        """The MLX module: token ids (batch, tokens) to logits (batch, tokens, vocabulary)."""
        return self._loaded.model

    @property
    def tokenizer(self) -> TokenizerWrapper:
        """mlx-lm's tokenizer of the model."""
        return self._loaded.tokenizer

    def generate(self, prompt: str, *, system_prompt: str | None = None, **options: Any) -> str:
        """The answer to ``prompt`` as text. ``options`` are those of :meth:`chat`.

        Raises:
            ConfigError: an option can't be right.
            DataError: the chat template refuses the conversation.
        """
        return "".join(self.chat(system_prompt=system_prompt, **options).say(prompt))

    def chat(
        self,
        *,
        system_prompt: str | None = None,
        template: bool = True,
        seed: int | None = None,
        stop_tokens: tuple[str, ...] = (),
        **sampling: Any,
    ) -> Chat:
        """A conversation, whose ``say(text)`` yields the pieces of each answer.

        Args:
            system_prompt: The system message.
            template: Whether to apply the chat template; False for models tuned on text rows.
            seed: Of the sampling, to get the same answer again.
            stop_tokens: More tokens that end an answer.
            sampling: ``max_tokens``, ``temp``, ``top_p`` and the other options of ``mlx_lm.generate``, with its
                defaults: see :class:`macft.evaluation.chat.Sampling`.

        Raises:
            ConfigError: an option can't be right, or there is none of that name.
        """
        import mlx.core as mx

        from macft.evaluation.chat import Chat, ModelAnswers, Sampling, add_stop_tokens, seed_problems

        try:
            chosen = Sampling(**sampling)
        except TypeError:
            unknown = sorted(set(sampling) - set(Sampling.__dataclass_fields__))
            raise ConfigError(
                f"{', '.join(unknown)}: no such option; there are {', '.join(Sampling.__dataclass_fields__)}"
            ) from None
        if problems := chosen.problems() + seed_problems(seed):
            raise ConfigError("\n".join(problems))
        if seed is not None:
            mx.random.seed(seed)
        add_stop_tokens(self.tokenizer, stop_tokens)
        source = ModelAnswers(self.model, self.tokenizer, chosen)
        return Chat(source, self.tokenizer, system_prompt=system_prompt, template=template)

    def close(self) -> None:
        """Takes macft's operations off the model. Safe to call twice."""
        self._installed.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load(
    run_folder: str | Path | None = None,
    *,
    model: str | None = None,
    adapter_path: str | Path | None = None,
    tuned: bool = True,
    placement: str | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """The model of a run with its adapter; or a base model, with or without an adapter.

    Args:
        run_folder: The run's folder.
        model: The base model instead of the run's: a bundled name, a Hugging Face id or a folder.
        adapter_path: An adapter's folder in mlx-lm's format, instead of the run's.
        tuned: False: the base model alone.
        placement: "stream" reads blocks from disk when they are needed; None: as in the run.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        ConfigError: there is no such run, or it has no adapter yet.
        ModelError: the model can't be found or read, or the adapter doesn't fit it.
    """
    found = TunedModel.find(
        _path(run_folder),
        base_model=model,
        adapter_path=_path(adapter_path),
        placement=placement,
        trust_remote_code=trust_remote_code,
    )
    return load_found(found, tuned=tuned)


def load_found(found: TunedModel, *, tuned: bool = True) -> Model:
    """The model that was ``found``, on this machine's device.

    Raises:
        MacftError: as in :func:`load`.
    """
    from macft.device.mlx_device import prepare_device

    prepare_device()
    return Model(found.load(tuned=tuned))


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value).expanduser()
