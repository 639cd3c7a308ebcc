"""``python -m macft.evaluate RUN_FOLDER``: compares the base model with the tuned one on held-out rows."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from macft.api.evaluation import Evaluation, EvaluationOptions, Progress, Results, evaluate_found
from macft.cli.parser import Parser, add_column_argument, check_output, command_parser, keys_are_options
from macft.cli.run_command import run_command
from macft.data.sources import SPLITS
from macft.device.durable import write_atomically
from macft.errors import ConfigError
from macft.evaluation.metrics import METRICS, PERPLEXITY
from macft.launch.generation.arguments import (
    add_cluster_arguments,
    distributed_model,
    follow_first_host,
    leading_rank,
    topology_of,
)
from macft.report.result_text import change_text, result_name, result_text
from macft.report.shown_phases import ShownPhases
from macft.run.tuned_model import TunedModel, add_model_arguments
from macft.topology.settings import TopologyConfig

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
    topology = topology_of(arguments)
    if follow_first_host(topology):
        return
    check_output("--json", arguments.json)
    tuned = TunedModel.from_arguments(arguments)
    console = Console(highlight=False)
    with keys_are_options(), ShownPhases() as phases:
        evaluation = evaluate_found(
            tuned,
            EvaluationOptions(
                dataset=arguments.dataset,
                columns=dict(arguments.column),
                split=arguments.split,
                rows=arguments.rows,
                metric=_metric(arguments.metric),
                max_tokens=arguments.max_tokens,
                mask_prompt=arguments.mask_prompt,
            ),
            progress=phases,
            compare=None if topology is None else partial(_compare_distributed, topology),
        )
    _show(evaluation, console)
    if arguments.json is not None:
        _write(arguments.json, evaluation.as_dict())


def _compare_distributed(
    topology: TopologyConfig, tuned: TunedModel, tokenizer: TokenizerWrapper, asked: Asked, progress: Progress
) -> Results:
    """The results of both models on the machines of ``topology``."""
    from macft.run.generation.leader import GenerationLeader, evaluate_distributed

    def measure(which: str, *, is_tuned: bool) -> Result:
        wanted = distributed_model(tuned, is_tuned=is_tuned)
        answers = GenerationLeader(rank, wanted, together=_TOGETHER, tell=lambda line: print(line, file=sys.stderr))
        result = evaluate_distributed(answers, asked, lambda what, *counts: progress(f"{which}, {what}", *counts))
        answers.close()
        return result

    with leading_rank(topology, tuned, tokenizer) as rank:
        return measure("base", is_tuned=False), measure("tuned", is_tuned=True)


def _show(evaluation: Evaluation, console: Console) -> None:
    base, tuned, rows = evaluation.base, evaluation.tuned, evaluation.rows
    for note in evaluation.notes:
        console.print(note, markup=False)
    console.print(_table(base.numbers(), tuned.numbers()))
    about = f"{rows} {evaluation.split} rows of {evaluation.dataset}, {base.target_tokens:,} target tokens"
    console.print(about, markup=False)
    if both := evaluation.agreement:
        words = "right in both {both}, only tuned {only_tuned}, only base {only_base}, neither {neither}"
        console.print(words.format(**both), markup=False)
    for which, result in (("base", base), ("tuned", tuned)):
        if result.scored is not None and result.scored.unanswered:
            console.print(
                f"{which}: {result.scored.unanswered} of {rows} answers were still thinking when they reached "
                "--max-tokens; they count as wrong"
            )


def _table(base: dict[str, float], tuned: dict[str, float]) -> Table:
    table = Table("", "base", "tuned", "change")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, before in base.items():
        if name in tuned:
            after = tuned[name]
            table.add_row(
                result_name(name), result_text(name, before), result_text(name, after), change_text(name, before, after)
            )
    return table


def _metric(given: str | None) -> str | list[str] | None:
    names = given.split(",") if given else []
    return names if len(names) > 1 else given


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
    add_column_argument(parser)
    parser.add_argument("--split", choices=SPLITS, help="default: test, else valid, else train, whichever has rows")
    parser.add_argument(
        "--rows", type=int, default=-1, help="number of rows, the same ones each time (default -1: all)"
    )
    names = ", ".join([*METRICS, PERPLEXITY])
    parser.add_argument(
        "--metric",
        metavar="NAME[,NAME]",
        help=f"what is measured beside the loss: {names}, my_module.my_metric, or none (default: the dataset's)",
    )
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
