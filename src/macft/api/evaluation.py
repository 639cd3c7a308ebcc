"""Base model against tuned model on held-out rows, from Python: what ``macft evaluate`` shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from macft.data.checks import check_rows
from macft.data.load import Sources, sample_rows, tokenize_split
from macft.data.load import read as read_dataset
from macft.data.settings import DatasetConfig, SourceConfig
from macft.data.settings import problems as dataset_problems
from macft.data.sources import SPLITS
from macft.data.template_clock import fix_clock
from macft.errors import ConfigError, DataError
from macft.evaluation.metrics import answer_metrics, check_metrics
from macft.run.tuned_model import TunedModel
from macft.training.settings import TrainingConfig

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from macft.evaluation.compare import Asked, Result
    from macft.evaluation.question import RowQuestion

Progress = Callable[[str, int, int], None]
Results: TypeAlias = "tuple[Result, Result]"
"""Of the base model and of the tuned one."""
Compare: TypeAlias = "Callable[[TunedModel, TokenizerWrapper, Asked, Progress], Results]"
"""Computes both results."""


@dataclass(frozen=True)
class Evaluation:
    """Both models on the same rows. ``base`` and ``tuned`` hold loss, tokens and the scored answers of each."""

    model: str
    adapter: Path
    dataset: str
    split: str
    metrics: list[str]
    rows: int
    questions: list[RowQuestion]
    base: Result
    tuned: Result
    notes: list[str]

    @property
    def agreement(self) -> dict[str, int]:
        """How many questions both, only one, or neither answers right; empty where no metric says right or wrong."""
        from macft.evaluation.compare import agreement

        return agreement(self.base, self.tuned)

    @property
    def answers(self) -> list[dict[str, Any]]:
        """RowQuestion, right answer and both models' answers, row by row; empty without a metric."""
        from macft.evaluation.compare import answers

        return answers(self.questions, self.base, self.tuned)

    def as_dict(self) -> dict[str, Any]:
        """Everything in JSON's types, as ``macft evaluate --json`` writes it: null for infinity and NaN."""
        return {
            "model": self.model,
            "adapter": str(self.adapter),
            "dataset": self.dataset,
            "split": self.split,
            "rows": self.rows,
            "target_tokens": self.base.target_tokens,
            "metrics": self.metrics,
            "base": _finite(self.base.numbers()),
            "tuned": _finite(self.tuned.numbers()),
            "agreement": self.agreement,
            "answers": self.answers,
        }


@dataclass(frozen=True)
class EvaluationOptions:
    """On which rows two models are compared, and by what.

    Attributes:
        dataset: A folder, a file or a Hugging Face id; None: the run's.
        columns: Of that ``dataset``: its column for a field of macft's, as ``dataset.columns``.
        split: None: the first of test, valid and train that has rows.
        rows: How many, the same ones each time; -1: all.
        metric: What is measured beside the loss, as ``dataset.metric``; "none": nothing; None: the dataset's.
        max_tokens: Of an answer; None: the run's.
        mask_prompt: Whether the loss is that of the answers only; None: as in the run.
    """

    dataset: str | None = None
    columns: Mapping[str, str] | None = None
    split: str | None = None
    rows: int = -1
    metric: str | Sequence[str] | None = None
    max_tokens: int | None = None
    mask_prompt: bool | None = None


def evaluate_found(
    found: TunedModel,
    options: EvaluationOptions,
    *,
    progress: Progress | None = None,
    compare: Compare | None = None,
) -> Evaluation:
    """Compares the model that was ``found`` with its base model.

    Args:
        found: A model with an adapter, or one that was tuned as a whole.
        options: On which rows, and by what.
        progress: Called with what is done, and how many of how many rows; 0 of 0 where there is no count.
        compare: Computes both results; None: in this process.

    Raises:
        MacftError: an option can't be right, or the model, the adapter or the dataset can't be read.
    """
    if options.rows == 0 or options.rows < -1:
        raise ConfigError(f"--rows: {options.rows} must be 1 or more, or -1 for all")
    adapter = found.adapter or found.whole
    if adapter is None:
        raise ConfigError("--adapter-path: nothing to compare; name an adapter beside --model")
    dataset, tell = _dataset(found, options), progress or (lambda *_: None)
    # Errors in the dataset are found before the weights are loaded, which takes longer.
    tell(f"reading the dataset {_named(dataset)}", 0, 0)
    sources = read_dataset(dataset, seed=_seed(found))
    split = _split(sources, options.split, dataset)
    tell(f"finding the model {found.model.path}", 0, 0)

    from macft.device.mlx_device import prepare_device

    tokenizer, asked, notes = _asked(found, options, dataset, sources, split, tell)
    prepare_device()
    base, tuned = (compare or compare_here)(found, tokenizer, asked, tell)
    for scored in (base.scored, tuned.scored):
        notes += [f"{name} is not measured: {reason}" for name, reason in (scored.failures if scored else {}).items()]
    return Evaluation(
        model=found.model.path,
        adapter=adapter,
        dataset=_named(dataset),
        split=split,
        metrics=dataset.metrics(),
        rows=len(asked.rows),
        questions=list(asked.questions),
        base=base,
        tuned=tuned,
        notes=notes,
    )


def _asked(
    found: TunedModel, options: EvaluationOptions, dataset: DatasetConfig, sources: Sources, split: str, tell: Progress
) -> tuple[TokenizerWrapper, Asked, list[str]]:
    """The tokenizer, what both models are asked, and lines for the user."""
    from macft.evaluation.compare import Asked
    from macft.evaluation.trial import asked_of
    from macft.model.fetch.resolve import resolve
    from macft.model.files.vocabulary import vocabulary_of
    from macft.model.load import load_tokenizer

    metrics = answer_metrics(dataset)
    folder = resolve(found.model)
    tokenizer = load_tokenizer(found.model, folder)
    notes = fix_clock(tokenizer, dataset.template_time)
    total, done = sum(len(raw[split]) for _, raw in sources), count(1)
    data, row_notes = tokenize_split(
        sources, dataset, tokenizer, split, row_done=lambda: tell("tokenizing", next(done), total)
    )
    if not data.rows:
        raise DataError(f"--split: no {split} row has a target token left")
    notes += row_notes
    notes += check_rows(
        {split: data}, tokenizer, vocabulary=vocabulary_of(folder), max_seq_length=dataset.max_seq_length
    )
    chosen = sample_rows(len(data.rows), options.rows, _seed(found))
    questions = asked_of([data.records[i] for i in chosen], metrics, tokenizer)
    training = found.run.training if found.run else TrainingConfig()
    max_tokens = options.max_tokens or training.metric_max_tokens
    return tokenizer, Asked([data.rows[i] for i in chosen], questions, metrics, max_tokens), notes


def _seed(found: TunedModel) -> int:
    """The run's, by which rows are split and chosen; 0 without a run."""
    return found.run.seed if found.run else 0


def compare_here(found: TunedModel, tokenizer: TokenizerWrapper, asked: Asked, progress: Progress) -> Results:
    """The results of the base model and of the tuned one, in this process."""
    from macft.evaluation.compare import evaluate
    from macft.model.adapters.attach import attach

    progress(f"loading the model {found.model.path}", 0, 0)
    loaded = found.load(tuned=False, tokenizer=tokenizer)
    base = evaluate(loaded, asked, lambda what, *counts: progress(f"base, {what}", *counts))
    if found.adapter is not None:
        attach(loaded.model, found.adapter)
    else:
        progress(f"loading the model {found.whole}", 0, 0)
        loaded = found.load(tokenizer=tokenizer)
    return base, evaluate(loaded, asked, lambda what, *counts: progress(f"tuned, {what}", *counts))


def _dataset(found: TunedModel, options: EvaluationOptions) -> DatasetConfig:
    """What ``options`` ask for, checked; raises ConfigError."""
    path, columns, metric, max_tokens = options.dataset, dict(options.columns or {}), options.metric, options.max_tokens
    dataset = found.run.dataset if found.run else DatasetConfig()
    if path is not None:
        # The run's sequence length and masking apply to the other dataset; its splits and columns do not.
        dataset = replace(
            dataset, **vars(SourceConfig(path=path, columns=columns)), sources=[], valid_fraction=0.0, test_fraction=0.0
        )
    elif columns:
        raise ConfigError("--column: is for another dataset; name it by --dataset")
    elif found.run is None:
        raise ConfigError("--dataset: name what to evaluate on: a folder, a file, a Hugging Face id or builtin:sql")
    if options.mask_prompt is not None:
        dataset = replace(dataset, mask_prompt=options.mask_prompt)
    if metric is not None:
        dataset = replace(dataset, metric=None if metric == "none" else metric)
    check_metrics(dataset)
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"--max-tokens: {max_tokens} must be 1 or more")
    if problems := dataset_problems(dataset):
        raise ConfigError("\n".join(problems))
    return dataset


def _split(sources: Sources, wanted: str | None, dataset: DatasetConfig) -> str:
    """The split asked for, or the first of test, valid and train that has rows."""
    counts = {name: sum(len(raw[name]) for _, raw in sources) for name in SPLITS}
    if wanted is None:
        return next(name for name in reversed(SPLITS) if counts[name])
    if not counts.get(wanted):
        available = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
        raise DataError(f"--split: {dataset.path or 'the dataset'} has no {wanted} rows; it has {available}")
    return wanted


def _named(dataset: DatasetConfig) -> str:
    return dataset.path or ", ".join(source.path for source in dataset.sources)


def _finite(numbers: dict[str, float]) -> dict[str, float | None]:
    """``numbers`` with null for infinity and NaN, which JSON doesn't have."""
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}
