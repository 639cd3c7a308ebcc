"""``python -m macft.evaluate RUN_FOLDER``: compares the base model with the tuned one on held-out rows."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.status import Status
from rich.table import Table

from macft.cli.parser import Parser, command_parser
from macft.cli.run_command import run_command
from macft.data.checks import check_rows
from macft.data.load import Sources, sample_rows, tokenize_split
from macft.data.load import read as read_dataset
from macft.data.settings import DatasetConfig, SourceConfig
from macft.data.settings import problems as dataset_problems
from macft.data.sources import SPLITS
from macft.data.template_clock import fix_clock
from macft.device.durable import write_atomically
from macft.errors import ConfigError, DataError
from macft.evaluation.metrics import METRICS, metric
from macft.launch.cluster_command import add_cluster_arguments, leading_rank, spread_model, topology_of
from macft.run.tuned_model import TunedModel, add_model_arguments
from macft.topology.settings import TopologyConfig
from macft.training.settings import TrainingConfig

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from macft.evaluation.compare import Asked, Result

_TOGETHER = 32
"""Most answers at the same time on a cluster."""


def main(argv: Sequence[str]) -> None:
    """Evaluates both models and shows the table.

    Raises:
        MacftError: The arguments are wrong, or the model, adapter or dataset can't be read.
    """
    arguments = _parser().parse_args(argv)
    if arguments.rows == 0 or arguments.rows < -1:
        raise ConfigError(f"--rows: {arguments.rows} must be 1 or more, or -1 for all")
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise ConfigError(f"--json: the folder {arguments.json.parent} does not exist")
    tuned = TunedModel.from_arguments(arguments)
    topology = topology_of(arguments)
    if tuned.adapter is None and tuned.whole is None:
        raise ConfigError("--adapter-path: nothing to compare; name an adapter beside --model")
    dataset = _dataset(arguments, tuned)
    training = tuned.run.training if tuned.run else TrainingConfig()
    seed = tuned.run.seed if tuned.run else 0
    # Errors in the dataset are found before the weights are loaded, which takes longer.
    sources = read_dataset(dataset, seed=seed)
    split = _split(sources, arguments.split, dataset)

    from macft.device.mlx_device import prepare_device
    from macft.evaluation.compare import Asked, agreement, answers
    from macft.model.load import load_tokenizer
    from macft.model.resolve import resolve
    from macft.model.vocabulary import vocabulary_of

    judge = metric(dataset.metric) if dataset.metric else None
    console = Console(highlight=False)
    folder = resolve(tuned.model)
    tokenizer = load_tokenizer(tuned.model, folder)
    notes = fix_clock(tokenizer, dataset.template_time)
    data, row_notes = tokenize_split(sources, dataset, tokenizer, split)
    if not data.rows:
        raise DataError(f"--split: no {split} row has a target token left")
    notes += row_notes
    notes += check_rows(
        {split: data}, tokenizer, vocabulary=vocabulary_of(folder), max_seq_length=dataset.max_seq_length
    )
    prepare_device()
    chosen = sample_rows(len(data.rows), arguments.rows, seed)
    rows, records = [data.rows[i] for i in chosen], [data.records[i] for i in chosen]
    asked = Asked(rows, records, judge, arguments.max_tokens or training.metric_max_tokens)
    with console.status("") as status:
        if topology is None:
            base, after = _compare_here(tuned, tokenizer, asked, status)
        else:
            base, after = _compare_spread(tuned, tokenizer, asked, status, topology)
    for note in notes:
        console.print(note, markup=False)
    both = agreement(base, after)
    console.print(_table(base.numbers(), after.numbers(), dataset.metric or "metric"))
    where = dataset.path or ", ".join(source.path for source in dataset.sources)
    console.print(f"{len(rows)} {split} rows of {where}, {base.target_tokens:,} target tokens", markup=False)
    if both:
        words = "right in both {both}, only tuned {only_tuned}, only base {only_base}, neither {neither}"
        console.print(words.format(**both), markup=False)
    for which, result in (("base", base), ("tuned", after)):
        if result.scored is not None and result.scored.unanswered:
            console.print(
                f"{which}: {result.scored.unanswered} of {len(rows)} answers were still thinking when they reached "
                "--max-tokens; they count as wrong"
            )
    if arguments.json is not None:
        report = {
            "model": tuned.model.path,
            "adapter": str(tuned.adapter or tuned.whole),
            "dataset": where,
            "split": split,
            "rows": len(rows),
            "target_tokens": base.target_tokens,
            "metric": dataset.metric,
            "base": _finite(base.numbers()),
            "tuned": _finite(after.numbers()),
            "agreement": both,
            "answers": answers(records, base, after),
        }
        _write(arguments.json, report)


def _compare_here(
    tuned: TunedModel, tokenizer: TokenizerWrapper, asked: Asked, status: Status
) -> tuple[Result, Result]:
    """The results of the base model and of the tuned one, in this process."""
    from macft.evaluation.compare import evaluate
    from macft.model.attach import attach

    loaded = tuned.load(tuned=False, tokenizer=tokenizer)
    base = evaluate(loaded, asked, partial(_progress, status, "base"))
    if tuned.adapter is not None:
        attach(loaded.model, tuned.adapter)
    else:
        loaded = tuned.load(tokenizer=tokenizer)
    return base, evaluate(loaded, asked, partial(_progress, status, "tuned"))


def _compare_spread(
    tuned: TunedModel, tokenizer: TokenizerWrapper, asked: Asked, status: Status, topology: TopologyConfig
) -> tuple[Result, Result]:
    """The same on the machines of ``topology``."""
    from macft.run.cluster_answers import ClusterAnswers, evaluate_spread

    def measure(which: str, *, is_tuned: bool) -> Result:
        answers = ClusterAnswers(rank, spread_model(tuned, is_tuned=is_tuned), together=_TOGETHER, tell=_tell)
        result = evaluate_spread(answers, asked, partial(_progress, status, which))
        answers.close()
        return result

    with leading_rank(topology, tokenizer) as rank:
        return measure("base", is_tuned=False), measure("tuned", is_tuned=True)


def _progress(status: Status, which: str, what: str, done: int, total: int) -> None:
    status.update(f"{which}, {what}: {done}/{total}")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _dataset(arguments: argparse.Namespace, tuned: TunedModel) -> DatasetConfig:
    dataset = tuned.run.dataset if tuned.run else DatasetConfig()
    if arguments.dataset is not None:
        # The run's sequence length and masking apply to the other dataset; its splits and columns do not.
        dataset = replace(dataset, **vars(SourceConfig(path=arguments.dataset)), sources=[], valid_fraction=0.0)
    elif tuned.run is None:
        raise ConfigError("--dataset: name what to evaluate on: a folder, a file, a Hugging Face id or builtin:sql")
    if arguments.mask_prompt is not None:
        dataset = replace(dataset, mask_prompt=arguments.mask_prompt)
    if arguments.metric is not None:
        dataset = replace(dataset, metric=None if arguments.metric == "none" else arguments.metric)
    if arguments.max_tokens is not None and arguments.max_tokens < 1:
        raise ConfigError(f"--max-tokens: {arguments.max_tokens} must be 1 or more")
    if problems := dataset_problems(dataset):
        raise ConfigError("\n".join(problems))
    return dataset


def _split(sources: Sources, wanted: str | None, dataset: DatasetConfig) -> str:
    """The split asked for, or the first of test, valid and train that has rows."""
    counts = {name: sum(len(raw[name]) for _, raw in sources) for name in SPLITS}
    if wanted is None:
        return next(name for name in reversed(SPLITS) if counts[name])
    if not counts[wanted]:
        available = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
        raise DataError(f"--split: {dataset.path or 'the dataset'} has no {wanted} rows; it has {available}")
    return wanted


def _table(base: dict[str, float], tuned: dict[str, float], metric: str) -> Table:
    table = Table("", "base", "tuned", "change")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, before in base.items():
        after = tuned[name]
        if name == "metric":
            shown = f"{before:.1%}", f"{after:.1%}", f"{100 * (after - before):+.1f} points"
        else:
            digits = 3 if name == "loss" else 2
            shown = f"{before:,.{digits}f}", f"{after:,.{digits}f}", f"{after - before:+,.{digits}f}"
        table.add_row(metric.replace("_", " ") if name == "metric" else name, *shown)
    return table


def _finite(numbers: dict[str, float]) -> dict[str, float | None]:
    """``numbers`` with null for infinity and NaN, which JSON doesn't have."""
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def _write(path: Path, report: dict[str, Any]) -> None:
    try:
        write_atomically(path, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ConfigError(f"--json: {path} can't be written ({error.strerror or error})") from error


def _parser() -> Parser:
    parser = command_parser("evaluate", epilog="Shows loss, perplexity and the dataset's metric of both models.")
    add_model_arguments(parser)
    add_cluster_arguments(parser)
    parser.add_argument("--dataset", help="evaluate on this instead of the run's: a folder, a file or a hub id")
    parser.add_argument("--split", choices=SPLITS, help="default: test, else valid, else train, whichever has rows")
    parser.add_argument(
        "--rows", type=int, default=-1, help="number of rows, the same ones each time (default -1: all)"
    )
    parser.add_argument("--metric", choices=[*METRICS, "none"], help="how answers are scored (default: the dataset's)")
    parser.add_argument("--max-tokens", "-m", type=int, help="longest answer for the metric (default: the run's)")
    parser.add_argument(
        "--mask-prompt",
        action=argparse.BooleanOptionalAction,
        help="the loss of the answers only (default: as the run did)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers and all answers there")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
