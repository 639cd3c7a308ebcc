"""``python -m macft.plan +recipe=NAME [overrides]``: predicts a run's memory and time, and starts nothing."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from macft.cli.parser import Parser, command_parser
from macft.cli.run_command import run_command
from macft.config.command_line import prepare
from macft.planner.run_plan import plan_run
from macft.planner.table import show

_PLAIN_WIDTH = 180
"""Columns of the table where standard output is not a terminal."""


def main(argv: Sequence[str]) -> int:
    """Prints the plan; returns 0 if the run fits, 1 if macft.train would refuse it.

    Raises:
        MacftError: The command line is wrong, or the model's configuration can't be read.
    """
    arguments = _parser().parse_intermixed_args(argv)
    overrides = list(arguments.overrides)
    if arguments.chips is not None:
        overrides.append(_chips_override(arguments.chips))
    config = prepare(overrides).job
    assert config is not None
    plan = plan_run(config)
    show(plan, Console(highlight=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH))
    return 0 if plan.fits else 1


def _chips_override(chips: str) -> str:
    """The value of ``--chips`` as an override: ``a,b`` is ``plan.chips=['a','b']``."""
    quoted = ",".join(f"'{name.strip()}'" for name in chips.replace("'", "").split(","))
    return f"plan.chips=[{quoted}]"


def _parser() -> Parser:
    parser = command_parser("plan", epilog="Exit status 1: macft.train would refuse this run.")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="the same as for macft.train")
    parser.add_argument("--chips", metavar="MACS", help='Macs to plan for, one node each: "M1 Air 8GB,M4 Max 64GB"')
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
