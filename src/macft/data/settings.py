"""The Hydra group ``dataset``: what to train on."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from macft.data.formats import FIELDS

_SINGLE_SOURCE = ("name", "weight", "train_split", "valid_split", "test_split", "columns")


@dataclass
class SourceConfig:
    """Where rows come from: one of several in ``dataset.sources``, or the dataset itself."""

    # builtin:sql, a folder with {train,valid,test}.jsonl, a .jsonl, .json, .parquet or .csv file, or a Hugging Face id.
    path: str = ""
    # The subset of a Hugging Face dataset.
    name: str | None = None
    # The training split, slices included: train[:90%].
    train_split: str = "train"
    # Its validation split, slices included; null: valid or validation, where there is one.
    valid_split: str | None = None
    # Its test split, slices included; null: test, where there is one.
    test_split: str | None = None
    # How often a row of this source is drawn, relative to a row of the others.
    weight: float = 1.0
    # Our field -> the dataset's column: {prompt: question, completion: answer}.
    columns: dict[str, str] = field(default_factory=dict)


@dataclass
class DatasetConfig(SourceConfig):
    """The Hydra group ``dataset``: a single source given here, or several in ``sources``."""

    # Several datasets at once, each with a weight.
    sources: list[SourceConfig] = field(default_factory=list)
    # Train on the answer only, the assistant's last message or the completion; what comes before it is no target.
    mask_prompt: bool = False
    # Longer rows are cut to this many tokens; the run says how many.
    max_seq_length: int = 2048
    # Share of the training rows to validate on where a source has no validation split.
    valid_fraction: float = 0.0
    # Share of the training rows to hold out for metrics and samples where a source has no test split. Null: where it
    # has no validation rows either, 5% of 100 rows or more, at most 32 rows; a note says so.
    test_fraction: float | None = None
    # The time that the chat template sees if it shows one: 2026-01-31T12:00:00; null: the time at which the run starts.
    template_time: str | None = None
    # What is measured on held-out rows before and after training: exact_match, rouge_l, sql_execution, perplexity, or a
    # function of your own, my_module.my_metric; several as a list; null: nothing.
    metric: Any = None
    # The folder in which your own metric's module is looked for first; null: the folder in which the command is typed.
    metric_folder: str | None = None

    def metrics(self) -> list[str]:
        """The names in ``metric``, in their order."""
        names = self.metric if isinstance(self.metric, list | tuple) else [self.metric]
        return [str(name) for name in names if name is not None]

    def all_sources(self) -> list[SourceConfig]:
        """The sources: ``sources``, or this dataset as the only one."""
        return list(self.sources) or [self]


def problems(config: DatasetConfig) -> list[str]:
    """One line for each invalid value; no I/O."""
    errors = []
    if config.path and config.sources:
        errors.append("dataset.path and dataset.sources: give one of them, not both")
    for name in _SINGLE_SOURCE if config.sources else ():
        if getattr(config, name) != getattr(DatasetConfig(), name):
            errors.append(f"dataset.{name}: has no effect when dataset.sources is given; set it in each source")
    if not config.path and not config.sources:
        errors.append("dataset.path: name what to train on: a folder, a file, a Hugging Face id or builtin:sql")
    for number, source in enumerate(config.all_sources()):
        where = f"dataset.sources[{number}]" if config.sources else "dataset"
        if config.sources and not source.path:
            errors.append(f"{where}.path: a source needs a path")
        if not (math.isfinite(source.weight) and source.weight > 0):
            errors.append(f"{where}.weight: {source.weight} must be greater than 0; leave the source out instead")
        for name in source.columns:
            if name not in FIELDS:
                near = difflib.get_close_matches(name, FIELDS, 1)
                hint = f"did you mean '{near[0]}'?" if near else f"the fields are {', '.join(FIELDS)}"
                errors.append(f"{where}.columns.{name}: no such field; {hint}")
    if config.max_seq_length < 2:
        errors.append(f"dataset.max_seq_length: {config.max_seq_length} must be 2 or more")
    if not 0.0 <= config.valid_fraction < 1.0:
        errors.append(f"dataset.valid_fraction: {config.valid_fraction} is not in [0, 1)")
    test_fraction = config.test_fraction or 0.0
    if not 0.0 <= test_fraction < 1.0:
        errors.append(f"dataset.test_fraction: {config.test_fraction} is not in [0, 1), or null")
    elif 0.0 <= config.valid_fraction < 1.0 <= config.valid_fraction + test_fraction:
        errors.append(
            f"dataset.test_fraction: {test_fraction} and dataset.valid_fraction ({config.valid_fraction}) leave no "
            "rows to train on; their sum must be less than 1"
        )
    try:
        datetime.fromisoformat(config.template_time or "2026-01-31")
    except ValueError:
        errors.append(f"dataset.template_time: '{config.template_time}' must be a time such as 2026-01-31T12:00:00")
    return errors
