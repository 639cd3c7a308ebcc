"""``python -m macft.plan +recipe=NAME [overrides]``: predicts a run's memory and time, and starts nothing."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from macft.cli.parser import Parser, command_parser
from macft.cli.run_command import run_command
from macft.config.command_line import prepare
from macft.network.link_kinds import LINK_KINDS
from macft.planner.plan.longest_row import LongestRowPlan, find_longest_rows
from macft.planner.plan.run_plan import plan_run
from macft.planner.plan.table import show, show_longest_rows
from macft.report.shown_phases import ShownPhases

_EPILOG = (
    "Prints the memory of each node by part, whether the run fits, where the blocks of the model would be, and an "
    "estimate of speed, time and energy. With topology.placement=auto the placements replicate, stream and pipeline "
    "are compared. Nothing is loaded. Exit status 1: macft.train would refuse this run."
)
_PLAIN_WIDTH = 100
"""Columns of the tables where standard output is not a terminal."""


def main(argv: Sequence[str]) -> int:
    """Prints the plan; returns 0 if the run fits, 1 if macft.train would refuse it. ``--longest-row`` returns 0.

    Raises:
        MacftError: The command line is wrong, or the model's configuration can't be read.
    """
    arguments = _parser().parse_intermixed_args(argv)
    overrides = list(arguments.overrides)
    if arguments.chips is not None:
        overrides.append(_list_override("plan.chips", arguments.chips))
    if arguments.link is not None:
        overrides.append(_list_override("plan.link", arguments.link))
    with ShownPhases() as phases:
        phases.begin("checking the configuration")
        config = prepare(overrides).job
        assert config is not None
        plan = (
            find_longest_rows(config, progress=phases) if arguments.longest_row else plan_run(config, progress=phases)
        )
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    if isinstance(plan, LongestRowPlan):
        show_longest_rows(plan, console)
        return 0
    show(plan, console)
    return 0 if plan.fits else 1


def _list_override(key: str, names: str) -> str:
    """``a,b`` as an override: ``key=['a','b']``."""
    quoted = ",".join(f"'{name.strip()}'" for name in names.replace("'", "").split(","))
    return f"{key}=[{quoted}]"


def _parser() -> Parser:
    parser = command_parser("plan", epilog=_EPILOG)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="the same as for macft.train")
    parser.add_argument(
        "--chips", metavar="MACS", help='Macs to plan for: "M1 Air 8GB,M4 Max 64GB" or "4x M2 Max 32GB"'
    )
    parser.add_argument(
        "--link",
        metavar="LINK",
        help=f"what connects them: {', '.join(LINK_KINDS)}, or bytes a second (500MB); one, or one for each Mac",
    )
    parser.add_argument(
        "--longest-row",
        action="store_true",
        help="print only how long a row of tokens could be on each of them, beside mlx_lm.lora",
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
