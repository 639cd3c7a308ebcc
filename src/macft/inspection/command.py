"""The command ``macft data``: shows the rows of a dataset as a model gets them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from rich.console import Console

from macft.cli.parser import Parser, add_column_argument, command_parser, keys_are_options
from macft.data.formats import parse
from macft.data.load import Sources, Split, read, tokenize_split
from macft.data.settings import DatasetConfig
from macft.data.settings import problems as dataset_problems
from macft.data.sources import SPLITS
from macft.errors import ConfigError, DataError
from macft.inspection.lengths import Lengths
from macft.inspection.row_view import RowView
from macft.inspection.show import RowPrinter, show_lengths
from macft.model.settings import ModelConfig
from macft.report.shown_phases import ShownPhases

_SHOWN_CHARACTERS = 1500


def main(argv: Sequence[str]) -> None:
    """Shows rows, their lengths, and what the checks before a run say of them.

    Raises:
        MacftError: The arguments are wrong, the dataset or the tokenizer can't be read, or a run would refuse a row.
    """
    arguments = _parser().parse_args(argv)
    with keys_are_options():
        _inspect(arguments, _dataset(arguments))


def _inspect(arguments: argparse.Namespace, dataset: DatasetConfig) -> None:
    phases = ShownPhases()
    with phases:
        phases.begin(f"reading the dataset {dataset.path}")
        sources = read(dataset, seed=0)
    raw = sources[0][1][arguments.split]
    if not raw:
        raise DataError(f"--split: {dataset.path} has no {arguments.split} rows; it has {_counts(sources)}")
    if arguments.row is not None and not 1 <= arguments.row <= len(raw):
        raise ConfigError(f"--row: {arguments.row} is not one of the {arguments.split} rows, 1 to {len(raw)}")

    with phases:
        phases.begin(f"loading the tokenizer of {arguments.model}")
        from macft.data.checks import check_rows
        from macft.data.template_clock import fix_clock
        from macft.model.fetch.resolve import resolve
        from macft.model.files.vocabulary import vocabulary_of
        from macft.model.load import load_tokenizer

        model = ModelConfig(path=arguments.model, trust_remote_code=arguments.trust_remote_code)
        folder = resolve(model)
        tokenizer, vocabulary = load_tokenizer(model, folder), vocabulary_of(folder)
    notes = fix_clock(tokenizer, None)
    console = Console(highlight=False)
    rows = f"{len(raw):,} row{'' if len(raw) == 1 else 's'}"
    whole = replace(dataset, max_seq_length=sys.maxsize)
    done = count(1)
    with phases:
        split, row_notes = tokenize_split(
            sources, whole, tokenizer, arguments.split, row_done=lambda: phases("tokenizing", next(done), len(raw))
        )

    size = f"which knows {vocabulary:,} tokens" if vocabulary else "whose number of tokens is not known"
    _print(console, [f"{dataset.path}, {arguments.split}: {rows}, for {model.path}, {size}"])
    if split.rows:
        _show(split, dataset, tokenizer, arguments, console)
    _print(console, [f"note: {note}" for note in notes + row_notes])
    checks = check_rows({arguments.split: split}, tokenizer, vocabulary=vocabulary, max_seq_length=sys.maxsize)
    _print(console, [f"note: {note}" for note in checks])
    if all(row.prompt_length >= dataset.max_seq_length for row in split.rows):
        raise DataError(
            f"--max-seq-length: no {arguments.split} row has a target left after cutting; "
            "raise it, unless they are empty"
        )


def _show(
    split: Split, dataset: DatasetConfig, tokenizer: Any, arguments: argparse.Namespace, console: Console
) -> None:
    """Prints the rows asked for and the lengths of all."""
    if not dataset.mask_prompt and not isinstance(parse(split.records[0]), str):
        _print(console, ["prompts are trained on, too; with --mask-prompt only the answers are"])
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    printer = RowPrinter(console, special, None if arguments.row is not None else _SHOWN_CHARACTERS)
    printer.legend()
    for index in _chosen(split, arguments):
        printer.show(RowView.of(split.rows[index], split.places[index], tokenizer, dataset.max_seq_length))
    show_lengths(Lengths.of(split.rows), dataset.max_seq_length, console)


def _print(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _dataset(arguments: argparse.Namespace) -> DatasetConfig:
    if arguments.rows < 0:
        raise ConfigError(f"--rows: {arguments.rows} must be 0 or more")
    dataset = DatasetConfig(
        path=arguments.dataset,
        columns=dict(arguments.column),
        mask_prompt=arguments.mask_prompt,
        max_seq_length=arguments.max_seq_length,
        test_fraction=0.0,
    )
    if problems := dataset_problems(dataset):
        raise ConfigError("\n".join(problems))
    return dataset


def _counts(sources: Sources) -> str:
    return ", ".join(f"{name} {len(sources[0][1][name])}" for name in SPLITS if sources[0][1][name])


def _chosen(split: Split, arguments: argparse.Namespace) -> list[int]:
    """Indices of the rows to show."""
    if arguments.row is None:
        return list(range(min(arguments.rows, len(split.rows))))
    found = [index for index, place in enumerate(split.places) if place.row == arguments.row]
    if not found:
        raise DataError(f"--row: {arguments.split} row {arguments.row} has no target token, so a run drops it")
    return found


def _parser() -> Parser:
    parser = command_parser("data", epilog="No weights are loaded. Exit status 1: a run would refuse the rows.")
    parser.add_argument("dataset", metavar="DATASET", help="a folder, a file, a Hugging Face id or builtin:sql")
    default = ModelConfig().path
    parser.add_argument(
        "--model", default=default, help=f"a bundled name, a Hugging Face id or a folder (default {default})"
    )
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="show the first N rows (default 3)")
    parser.add_argument("--row", type=int, metavar="N", help="show row N, all of it, instead")
    parser.add_argument("--split", choices=SPLITS, default="train", help="of which rows (default train)")
    parser.add_argument(
        "--mask-prompt", action=argparse.BooleanOptionalAction, default=False, help="train on the answers only"
    )
    parser.add_argument(
        "--max-seq-length",
        type=int,
        default=DatasetConfig().max_seq_length,
        metavar="N",
        help="cut rows (default 2048)",
    )
    add_column_argument(parser)
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    return parser
